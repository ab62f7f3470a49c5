"""One function, however it is computed: chunked, padded, batched, cached, under every attention back end."""

import pytest
import torch
from transformers import utils

from deltamem import DeltaMemConfig, DeltaMemory, get_delta_mem_model
from deltamem.errors import DeltaMemError
from tests.tiny_models import FAMILIES

# transformers has no SDPA for Gemma 2 (soft-capped scores)
CASES = [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")]
STRATEGIES = ["tsw", "ssw", "msw"]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def build(tiny_model, family="qwen3", attention="eager", strategy="tsw", **config):
    model = get_delta_mem_model(tiny_model(family, attention), DeltaMemConfig(strategy=strategy, **config))
    with torch.no_grad():  # steering strong enough that a wrong read shows
        for layer in model.memory_layers.values():
            layer.in_proj.normal_(0, 0.4)
            for weight in layer.steer.values():
                weight.normal_(0, 0.1)
    return model.eval()


def tokens(batch, length, seed=0):
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def used_memory(model, batch, seed=5):
    """A memory that isn't empty, so that reads matter from the first token."""
    generator = torch.Generator().manual_seed(seed)
    empty = model.new_memory(batch)
    return DeltaMemory({i: torch.randn(s.shape, generator=generator) for i, s in empty.states.items()})


def segments(batch, length):
    return torch.arange(length).div(3, rounding_mode="floor").expand(batch, length)


def assert_same_memory(actual, expected):
    for i in expected.states:
        torch.testing.assert_close(actual.states[i], expected.states[i], **TOLERANCE)


@pytest.mark.parametrize("family,attention", CASES)
def test_the_memory_matters_and_is_returned_new(tiny_model, family, attention):
    model = build(tiny_model, family, attention, steer=("q", "k", "v", "o"))
    ids, memory = tokens(2, 12), used_memory(model, 2)
    before = {i: s.clone() for i, s in memory.states.items()}
    with torch.no_grad():
        out = model(ids, memory=memory)
        empty = model(ids, write=False)
        bare = model.base_model(ids)
    assert (out.logits - bare.logits).abs().max() > 1e-2
    torch.testing.assert_close(empty.logits, bare.logits)  # an empty memory that isn't written steers nothing
    assert all(torch.equal(before[i], memory.states[i]) for i in before)
    assert all(not torch.equal(before[i], out.memory.states[i]) for i in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steering_that_starts_from_zero_is_the_frozen_backbone_whatever_the_memory_holds(tiny_model, strategy):
    config = DeltaMemConfig(strategy=strategy, steer=("q", "k", "v", "o"), output_init="zero")
    model = get_delta_mem_model(tiny_model("qwen3"), config).eval()
    ids = tokens(2, 12)
    with torch.no_grad():
        out = model(ids, memory=used_memory(model, 2), segment_ids=segments(2, 12))
        torch.testing.assert_close(out.logits, model.base_model(ids).logits)


@pytest.mark.parametrize("family,attention", CASES)
def test_chunked_prefill_is_one_shot(tiny_model, family, attention):
    model = build(tiny_model, family, attention, "msw" if family == "llama" else "tsw")
    ids, memory = tokens(2, 20), used_memory(model, 2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, memory=memory)
        cache, logits = None, []
        for start, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
            out = model(
                ids[:, start:end], attention_mask=mask[:, :end], memory=memory, past_key_values=cache, use_cache=True
            )
            memory, cache = out.memory, out.past_key_values
            logits.append(out.logits)
    assert_same_memory(memory, whole.memory)
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[valid], whole.logits[valid], **TOLERANCE)


@pytest.mark.parametrize("family,attention", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_left_right_or_none_and_batching_change_nothing(tiny_model, family, attention, strategy):
    model = build(tiny_model, family, attention, strategy)
    lengths, width = (5, 12, 9), 12
    rows = [tokens(1, length, seed=length) for length in lengths]
    row_segments = [segments(1, length) for length in lengths]
    memory = used_memory(model, 3)
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        segment_ids = torch.full((3, width), -1)
        for b, (row, seg) in enumerate(zip(rows, row_segments, strict=True)):
            at = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
            ids[b, at], mask[b, at], segment_ids[b, at] = row[0], 1, seg[0]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, memory=memory, segment_ids=segment_ids, position_ids=positions)
            for b, (row, seg) in enumerate(zip(rows, row_segments, strict=True)):
                alone = model(row, memory=memory.select([b]), segment_ids=seg)
                torch.testing.assert_close(out.logits[b][mask[b].bool()], alone.logits[0], **TOLERANCE)
                assert_same_memory(out.memory.select([b]), alone.memory)
        if side == "right":
            options = {"attention_mask": mask, "memory": memory, "segment_ids": segment_ids, "right_padded": True}
            with torch.no_grad():
                unmasked = model(ids, use_cache=False, **options)
                torch.testing.assert_close(unmasked.logits[mask.bool()], out.logits[mask.bool()], **TOLERANCE)
                assert_same_memory(unmasked.memory, out.memory)
                assert_same_memory(model.write(ids, **options), out.memory)


def test_a_word_given_for_right_padding_is_not_taken_with_a_cache(tiny_model):
    model, ids = build(tiny_model), tokens(1, 4)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(DeltaMemError, match="right_padded"):
        model(ids, past_key_values=cache, right_padded=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_write_is_forward_without_the_rest(tiny_model, strategy):
    model = build(tiny_model, strategy=strategy)
    ids, memory = tokens(2, 11), used_memory(model, 2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "memory": memory, "segment_ids": segments(2, 11)}
    with torch.no_grad():
        assert_same_memory(model.write(ids, **options), model(ids, **options).memory)


@torch.no_grad()
def test_gates_are_reported_for_a_single_token_too(tiny_model):
    model = build(tiny_model)
    ids, memory = tokens(2, 1), used_memory(model, 2)
    with_gates, gates = model.write_with_gates(ids, memory=memory)
    assert gates.shape == (3,) and all(0 < gate < 1 for gate in gates)
    assert_same_memory(with_gates, model.write(ids, memory=memory))


def test_write_runs_neither_head_nor_last_layer(tiny_model):
    model = build(tiny_model)
    ran = []
    last = model.base_model.get_decoder().layers[-1]
    for name, module in (("attention", last.self_attn), ("mlp", last.mlp), ("head", model.base_model.lm_head)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.write(tokens(1, 5))
    assert ran == []
    model(tokens(1, 5))
    assert sorted(ran) == ["attention", "head", "mlp"]


def test_layers_without_a_memory_are_left_alone(tiny_model):
    model = build(tiny_model, layers=(1,))
    ids = tokens(1, 6)
    memory = used_memory(model, 1)
    assert list(memory.states) == [1]
    with torch.no_grad():
        assert_same_memory(model.write(ids, memory=memory), model(ids, memory=memory).memory)


def test_two_sessions_interleaved_on_one_model_do_not_touch(tiny_model):
    model = build(tiny_model)
    streams = {name: tokens(1, 24, seed) for seed, name in enumerate("ab")}
    memories, caches = dict.fromkeys(streams), dict.fromkeys(streams)
    with torch.no_grad():
        for start in range(0, 24, 4):
            for name, ids in streams.items():
                out = model(
                    ids[:, start : start + 4], memory=memories[name], past_key_values=caches[name], use_cache=True
                )
                memories[name], caches[name] = out.memory, out.past_key_values
        for name, ids in streams.items():
            assert_same_memory(memories[name], model(ids).memory)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reading_only_leaves_the_memory_as_it_came(tiny_model, strategy):
    model = build(tiny_model, strategy=strategy)
    memory = used_memory(model, 2)
    out = model(tokens(2, 7), memory=memory, write=False)
    assert all(torch.equal(out.memory.states[i], memory.states[i]) for i in memory.states)


def quantities(tiny_model, attention, device, dtype):
    """What a model computes of two rows, one of them padded: memories and logits at once, in parts and read only, and
    the adapter's gradients through writing and reading. {what: float32}"""
    model = build(tiny_model, "qwen3", attention)
    model = model.to(device, dtype)
    ids = tokens(2, 40).to(device)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    memory = DeltaMemory({i: s.to(device) for i, s in used_memory(model, 2).states.items()})
    valid, found = mask.bool(), {}
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, memory=memory)
        cache, part, logits = None, memory, []
        for start, end in ((0, 20), (20, 39), (39, 40)):
            out = model(
                ids[:, start:end], attention_mask=mask[:, :end], memory=part, past_key_values=cache, use_cache=True
            )
            part, cache = out.memory, out.past_key_values
            logits.append(out.logits)
    found |= {"logits": whole.logits[valid], "logits with a cache": torch.cat(logits, 1)[valid]}
    found |= {f"state {i}": state for i, state in whole.memory.states.items()}
    found |= {f"state {i} with a cache": state for i, state in part.states.items()}
    written = model.write(ids, attention_mask=mask, memory=memory)
    labels = ids.masked_fill(~valid, -100)
    model(ids, attention_mask=mask, memory=written, write=False, labels=labels).loss.backward()
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.float().cpu() for name, value in found.items()}


FLASH_ATTENTION = {
    "flash_attention_2": utils.is_flash_attn_2_available,
    "flash_attention_3": utils.is_flash_attn_3_available,
    "flash_attention_4": utils.is_flash_attn_4_available,
}


@pytest.mark.parametrize(
    ("attention", "device"),
    [("eager", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in FLASH_ATTENTION)],
)
def test_in_bfloat16_no_attention_is_farther_from_float32_than_sdpa(tiny_model, attention, device):
    """FlashAttention takes half precision alone, so that float32 is what both are measured against."""
    if device == "cuda" and not FLASH_ATTENTION[attention]():
        pytest.skip(f"{attention} is not installed")
    exact = quantities(tiny_model, "sdpa", device, torch.float32)
    sdpa, other = (quantities(tiny_model, name, device, torch.bfloat16) for name in ("sdpa", attention))
    assert len(exact) == len(other) and any(name.startswith("gradient") for name in exact)

    def error(found, name):
        return ((found[name] - exact[name]).norm() / exact[name].norm()).item()

    worse = {name: (error(other, name), error(sdpa, name)) for name in exact}
    assert {name: pair for name, pair in worse.items() if not pair[0] < 2 * pair[1] + 0.01} == {}


def test_a_model_that_its_user_compiles_answers_as_plain(tiny_model):
    model = build(tiny_model, "llama", "sdpa", alpha=32.0)
    with torch.no_grad():
        plain, compiled = (
            run(tokens(2, 12), memory=used_memory(model, 2)) for run in (model, torch.compile(model, backend="eager"))
        )
    torch.testing.assert_close(compiled.logits, plain.logits, **TOLERANCE)
