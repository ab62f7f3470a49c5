"""Every kind of decoder and adapter gives in vLLM what it gives in our own ``generate``."""

import pytest

from deltamem_vllm.names import FAMILIES
from tests.tiny_models import FAMILIES as OURS

PROMPTS = (31, 5, 150, 64)


def test_every_family_that_is_tested_elsewhere_has_a_class_here():
    assert len(FAMILIES) == len(OURS)


@pytest.mark.parametrize("family", OURS)
def test_each_family_equals_generate(start_engine, family):
    from tests.deltamem_vllm.engines import assert_equal, draw_prompts

    engine = start_engine(family=family)
    prompts = draw_prompts(*PROMPTS)
    for prompt, found in zip(prompts, engine.run(prompts), strict=True):
        assert_equal(found, engine.expected(prompt))


@pytest.mark.parametrize(
    "adapter",
    [
        {"strategy": "msw"},
        {"steer": ("q", "k", "v", "o"), "layers": (0, 2)},
        {"steer": ("v",), "rank": 4, "strategy": "msw", "num_states": 2, "alpha": 6.0},
    ],
    ids=["msw", "all heads, some layers", "values only"],
)
def test_each_kind_of_adapter_equals_generate_with_its_prompts_read_in_parts(start_engine, adapter):
    from tests.deltamem_vllm.engines import assert_equal, draw_prompts

    engine = start_engine(adapter=adapter, max_num_batched_tokens=48, max_num_seqs=8)
    prompts = draw_prompts(*PROMPTS)
    for prompt, found in zip(prompts, engine.run(prompts), strict=True):
        assert_equal(found, engine.expected(prompt))
