"""Several adapters in one engine: each request is answered by its own, as if that were alone."""

import pytest
import torch

from deltamem_vllm.handover import to_bytes
from tests.deltamem_vllm.engines import assert_equal, assert_same_memory, draw_prompts, metric

ADAPTERS = {
    "tsw": {},
    "msw": {"strategy": "msw", "limit_norms": True},
    "other": {"alpha": 6.0, "steer": ("k", "v", "o")},
}
BLOCK = 32
NAMES = ("msw", "tsw", "other", "tsw", "msw", "other")


@pytest.fixture(scope="module")
def engine(start_engine):
    """One that caches beginnings, and reads prompts in parts while others decode."""
    return start_engine(
        adapters=ADAPTERS, enable_prefix_caching=True, block_size=BLOCK, max_num_batched_tokens=96, max_num_seqs=8
    )


def written(engine, names, seed):
    """For each adapter named, the memory that a text of its own leaves with it."""
    texts = draw_prompts(*[20] * len(names), seed=seed)
    return [engine.models[name].write(torch.tensor([text])) for name, text in zip(names, texts, strict=True)]


def test_sequences_of_different_adapters_together_are_each_as_alone(engine):
    prompts, memories = draw_prompts(40, 150, 9, 31, 64, 70, seed=1), written(engine, NAMES, seed=2)
    limits = engine.models["msw"].memory_layers["0"].norm_limit
    assert all(
        (memory.norms()[0] > limits).any() for memory, name in zip(memories, NAMES, strict=True) if name == "msw"
    )
    together = engine.run(prompts, memories, adapters=NAMES)
    for prompt, memory, name, found in zip(prompts, memories, NAMES, together, strict=True):
        assert_equal(found, engine.expected(prompt, memory, adapter=name))
        (alone,) = engine.run([prompt], [memory], adapters=[name])
        assert alone[0] == found[0]
        assert_same_memory(alone[2], found[2])


def test_without_a_name_the_first_adapter_answers(engine):
    (prompt,) = draw_prompts(30, seed=3)
    assert_equal(engine.run([prompt])[0], engine.expected(prompt, adapter="tsw"))


def test_cached_beginnings_are_never_handed_from_one_adapter_to_another(engine):
    (prompt,) = draw_prompts(200, seed=4)
    before = metric(engine, "prefix_cache_hits")
    first = {name: engine.run([prompt], adapters=[name])[0] for name in ADAPTERS}
    assert metric(engine, "prefix_cache_hits") == before
    for name, found in first.items():
        assert_equal(found, engine.expected(prompt, adapter=name))
        (again,) = engine.run([prompt], adapters=[name])
        assert again[0] == found[0]
        assert_same_memory(again[2], found[2], atol=1e-5)
    assert metric(engine, "prefix_cache_hits") > before


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"adapter": "nobody"}, "no adapter 'nobody' here; there are tsw, msw, other"),
        ({"adapter": ["tsw"]}, "no adapter"),
        ({"adapter": "msw", "memory": "tsw's"}, "this adapter's memories have"),
    ],
    ids=["unknown", "no text", "another's memory"],
)
def test_a_request_that_no_adapter_can_answer_is_told_why(engine, said, reason):
    from vllm import SamplingParams

    if "memory" in said:
        said = {**said, "memory": to_bytes(engine.models["tsw"].new_memory(1))}
    params = {"kv_transfer_params": {"deltamem": said}}
    how = SamplingParams(temperature=0, max_tokens=9, extra_args=params, detokenize=False, ignore_eos=True)
    (prompt,) = draw_prompts(20, seed=5)
    (reply,) = engine.llm.generate([{"prompt_token_ids": prompt}], [how], use_tqdm=False)
    assert reason in reply.kv_transfer_params["deltamem_error"]


def test_preempted_requests_go_on_with_their_own_adapters(start_engine):
    engine = start_engine(
        adapters=ADAPTERS, enable_prefix_caching=True, block_size=BLOCK, num_gpu_blocks_override=22, max_model_len=160,
        max_num_seqs=8,
    )  # fmt: skip
    prompts, memories = draw_prompts(60, 61, 62, 63, 50, 40, seed=6), written(engine, NAMES, seed=7)
    found = engine.run(prompts, memories, tokens=60, adapters=NAMES)
    assert metric(engine, "num_preemptions") > 0
    for prompt, memory, name, reply in zip(prompts, memories, NAMES, found, strict=True):
        assert_equal(reply, engine.expected(prompt, memory, tokens=60, adapter=name))
