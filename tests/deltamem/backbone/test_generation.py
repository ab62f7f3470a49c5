"""transformers' own generate, with a memory passed in and taken out."""

import pytest
import torch

from deltamem import DeltaMemConfig, DeltaMemError, get_delta_mem_model

ATTENTION = ["eager", "sdpa"]


@pytest.fixture(params=ATTENTION)
def model(tiny_model, request):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", request.param), DeltaMemConfig(strategy="msw"))
    for layer in model.memory_layers.values():
        for weight in layer.steer.values():
            torch.nn.init.normal_(weight, 0, 0.1)
    return model.eval()


def tokens(batch, length, seed=0):
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, **options):
    return model.generate(
        ids, do_sample=False, return_dict_in_generate=True, **{"max_new_tokens": 8, "eos_token_id": None, **options}
    )


def assert_same_memory(actual, expected):
    for i in expected.states:
        torch.testing.assert_close(actual.states[i], expected.states[i], rtol=1e-5, atol=1e-5)


def test_cached_decoding_is_recomputing(model):
    ids = tokens(2, 9)
    memory = model.write(tokens(2, 15, 1))
    out = greedy(model, ids, memory=memory)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            step = model(expected, memory=memory)
            expected = torch.cat([expected, step.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.sequences, expected)
    with torch.no_grad():  # the last token was generated, but not fed
        assert_same_memory(out.memory, model(expected[:, :-1], memory=memory).memory)


def test_a_static_cache_gives_the_same(model):
    ids = tokens(2, 9)
    dynamic, static = greedy(model, ids), greedy(model, ids, cache_implementation="static")
    assert torch.equal(dynamic.sequences, static.sequences)
    assert_same_memory(static.memory, dynamic.memory)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_is_one_by_one_even_after_a_row_has_ended(model, cache):
    rows = [tokens(1, 4, 1), tokens(1, 9, 2), tokens(1, 6, 3)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 9 - row.shape[1] :], mask[b, 9 - row.shape[1] :] = row[0], 1
    memory = model.write(tokens(3, 7, 9))
    ends = greedy(model, rows[0], memory=memory.select([0])).sequences[0, 6].item()  # row 0 ends after three tokens
    options = {"eos_token_id": ends, "pad_token_id": 0, "cache_implementation": cache}
    batch = greedy(model, ids, attention_mask=mask, memory=memory, **options)
    for b, row in enumerate(rows):
        alone = greedy(model, row, memory=memory.select([b]), **options)
        new = alone.sequences[0, row.shape[1] :]
        assert torch.equal(batch.sequences[b, 9 : 9 + len(new)], new)
        assert_same_memory(batch.memory.select([b]), alone.memory)


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_beams_take_their_memory_along(tiny_model, strategy):
    model = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(strategy=strategy, output_init="random")).eval()
    ids, segment_ids = tokens(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    memory = model.write(tokens(2, 6, 4), segment_ids=segment_ids)
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 6, "segment_ids": segment_ids}
    out = greedy(model, ids, memory=memory, **options)
    assert out.memory.batch_size == 4
    with torch.no_grad():
        for row in range(4):
            b, sequence = row // 2, out.sequences[row : row + 1]
            step = model(ids[b : b + 1], memory=memory.select([b]), segment_ids=segment_ids[:1], use_cache=True)
            for t in range(6, sequence.shape[1] - 1):
                fed = sequence[:, t : t + 1]
                step = model(fed, memory=step.memory, past_key_values=step.past_key_values, use_cache=True)
            assert_same_memory(out.memory.select([row]), step.memory)


def test_sampling_is_seeded_and_several_samples_share_the_memory(model):
    ids, memory = tokens(2, 6), model.write(tokens(2, 12, 4))
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "eos_token_id": None}
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(model.generate(ids, memory=memory, **options))
    assert torch.equal(*results) and results[0].shape == (6, 11)


def test_a_conversation_goes_on_from_its_cache(model):
    first, second = tokens(1, 6), tokens(1, 5, 8)
    one = greedy(model, first)
    history = torch.cat([one.sequences, second], 1)
    two = greedy(model, history, memory=one.memory, past_key_values=one.past_key_values)
    assert torch.equal(two.sequences, greedy(model, history).sequences)


def test_reading_only_generates_with_an_unchanged_memory(model):
    memory = model.write(tokens(1, 12, 4))
    out = greedy(model, tokens(1, 6), memory=memory, write=False)
    assert all(torch.equal(out.memory.states[i], memory.states[i]) for i in memory.states)


def test_ssw_generates_with_segments(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(strategy="ssw")).eval()
    ids = tokens(1, 6)
    out = greedy(model, ids, segment_ids=torch.tensor([[-1, 0, 0, 0, 1, 1]]))
    assert out.memory.norms()[0].item() > 0
    with pytest.raises(DeltaMemError, match="pass segment_ids"):
        greedy(model, ids)


@pytest.mark.parametrize(
    "option,message",
    [
        ({"assistant_model": "x"}, "rolls the cache back"),
        ({"prompt_lookup_num_tokens": 3}, "rolls the cache back"),
        ({"use_cache": False}, "feeds the prompt again"),
        ({"cache_implementation": "paged"}, "pass such a cache as past_key_values"),
    ],
    ids=["assistant", "prompt-lookup", "no-cache", "unknown-cache"],
)
def test_what_cannot_work_says_so(model, option, message):
    with pytest.raises(DeltaMemError, match=message):
        model.generate(tokens(1, 4), max_new_tokens=3, **option)


def test_a_cache_that_carries_a_memory_refuses_to_forget(model):
    out = greedy(model, tokens(1, 4))
    with pytest.raises(DeltaMemError, match="can't be rolled back"):
        out.past_key_values.crop(2)
