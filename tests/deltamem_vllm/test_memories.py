"""Memories in and out of the engine, and what the engine does with its pages meanwhile."""

import pytest
import torch

from deltamem import DeltaMemory
from tests.deltamem_vllm.engines import assert_equal, assert_same_memory, draw_prompts, metric

BLOCK = 32


def written(engine, text):
    """The memory that a text leaves."""
    return engine.model.write(torch.tensor([text]))


@pytest.fixture(scope="module")
def engine(start_engine):
    """One that caches beginnings, in small blocks, and reads prompts in parts."""
    return start_engine(
        enable_prefix_caching=True, block_size=BLOCK, max_num_batched_tokens=96, max_num_seqs=8, adapter={"rank": 8}
    )


def test_a_memory_goes_in_and_comes_out(engine):
    prompts = draw_prompts(40, 70, 9, seed=1)
    memories = [written(engine, text) for text in draw_prompts(30, 30, 30, seed=2)]
    for row, found in enumerate(engine.run(prompts, memories)):
        assert_equal(found, engine.expected(prompts[row], memories[row]))


def test_reading_only_leaves_the_memory_as_it_is_to_the_bit(engine):
    (prompt,), (text,) = draw_prompts(80, seed=3), draw_prompts(30, seed=4)
    memory = written(engine, text)
    (found,) = engine.run([prompt], [memory], write_from=None)
    assert_equal(found, engine.expected(prompt, memory, write=False))
    for layer, state in memory.states.items():
        assert torch.equal(found[2].states[layer], state)


@pytest.mark.parametrize("start", [1, 31, 64, 100])
def test_tokens_before_a_position_are_read_and_those_from_it_on_written(engine, start):
    (prompt,), (text,) = draw_prompts(130, seed=5), draw_prompts(30, seed=6)
    memory = written(engine, text)
    (found,) = engine.run([prompt], [memory], write_from=start)
    assert_equal(found, engine.expected(prompt, memory, write_from=start))


def test_cached_beginnings_are_those_of_the_same_memory_only(engine):
    """One prompt under three memories, and each again: the second time from the cache, with the very same result."""
    (prompt,) = draw_prompts(200, seed=7)
    memories = [written(engine, text) for text in draw_prompts(30, 30, seed=8)]
    memories.append(engine.model.new_memory(1))
    first = [engine.run([prompt], [memory])[0] for memory in memories]
    for found, memory in zip(first, memories, strict=True):
        assert_equal(found, engine.expected(prompt, memory))
    for before, memory in zip(first, memories, strict=True):
        again = engine.run([prompt], [memory])[0]
        assert again[0] == before[0]
        assert_same_memory(again[2], before[2], atol=1e-5)
    assert metric(engine, "prefix_cache_hits") > 0


def test_how_strongly_it_steers_is_the_requests_to_say(engine):
    (prompt,), (text,) = draw_prompts(50, seed=9), draw_prompts(30, seed=10)
    memory = written(engine, text)
    for strength in (0.0, 0.5):
        engine.model.strength = strength
        (found,) = engine.run([prompt], [memory], strength=strength)
        assert_equal(found, engine.expected(prompt, memory))
    engine.model.strength = 1.0


def test_a_grown_sequence_goes_on_from_the_cache_as_if_it_were_read_anew(engine):
    (first, more) = draw_prompts(90, 40, seed=11)
    reply, _, _ = engine.run([first])[0]
    whole = [*first, *reply, *more]
    assert_equal(engine.run([whole])[0], engine.expected(whole))


NONSENSE = {
    "no base64": {"memory": "not base64!"},
    "too short": {"memory": "AAAA"},
    "a path": {"memory": "/etc/passwd"},
    "a number": {"memory": 7},
    "unknown": {"path": "/tmp/x"},
    "negative": {"write_from": -1},
    "huge": {"write_from": 2**40},
    "text": {"write_from": "0"},
    "infinite": {"strength": float("inf")},
    "key": {"keep": "x" * 1000},
    "list": [1, 2],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_from_a_client_is_answered_with_a_reason_and_the_engine_lives_on(engine, name):
    from vllm import SamplingParams

    params = {"kv_transfer_params": {"deltamem": NONSENSE[name]}}
    how = SamplingParams(temperature=0, max_tokens=9, extra_args=params, detokenize=False, ignore_eos=True)
    (prompt,) = draw_prompts(20, seed=12)
    (reply,) = engine.llm.generate([{"prompt_token_ids": prompt}], [how], use_tqdm=False)
    assert len(reply.outputs[0].token_ids) == 1
    assert reply.kv_transfer_params["deltamem_error"]
    assert_equal(engine.run([prompt])[0], engine.expected(prompt))


def test_numbers_that_are_not_finite_are_refused(engine):
    memory = engine.model.new_memory(1)
    broken = DeltaMemory({layer: state * float("nan") for layer, state in memory.states.items()})
    (prompt,) = draw_prompts(20, seed=13)
    assert engine.run([prompt], [broken])[0][2] is None


def test_an_aborted_request_leaves_the_others_as_they_are(engine):
    from vllm import SamplingParams

    (prompt,) = draw_prompts(150, seed=14)
    core = engine.llm.llm_engine
    how = SamplingParams(temperature=0, max_tokens=500, detokenize=False, ignore_eos=True)
    core.add_request("doomed", {"prompt_token_ids": prompt}, how)
    for _ in range(4):
        core.step()
    core.abort_request(["doomed"])
    (other,) = draw_prompts(60, seed=15)
    assert_equal(engine.run([other])[0], engine.expected(other))
    assert_equal(engine.run([prompt])[0], engine.expected(prompt))


@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests_end_as_if_they_had_not_been(start_engine, caching):
    """So few blocks that not all sequences fit to their ends: some begin again, from the memories they came with."""
    engine = start_engine(
        enable_prefix_caching=caching, block_size=BLOCK, num_gpu_blocks_override=22, max_model_len=160, max_num_seqs=8
    )
    prompts = draw_prompts(60, 61, 62, 63, 50, 40, seed=16)
    memories = [written(engine, text) for text in draw_prompts(*[20] * 6, seed=17)]
    found = engine.run(prompts, memories, tokens=60)
    assert metric(engine, "num_preemptions") > 0
    for row, reply in enumerate(found):
        assert_equal(reply, engine.expected(prompts[row], memories[row], tokens=60))
