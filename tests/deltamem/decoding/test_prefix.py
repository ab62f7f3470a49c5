"""Rows that share a beginning read, write and decode as if each had read it alone."""

import pytest
import torch
from transformers import DynamicCache

from deltamem import DeltaMemConfig, DeltaMemModel, DeltaMemory, get_delta_mem_model
from deltamem.decoding.attention import PREFIXED, can_share_prefixes, with_attention
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.prefix import PrefixReader
from deltamem.decoding.slot_decoder import SlotDecoder
from deltamem.errors import DeltaMemError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ["qwen3", "smollm3", "llama", "qwen2", "mistral", "gemma", "phi3"]


def build(tiny_model, family, strategy):
    base = tiny_model(family, "sdpa").to(DEVICE)
    if strategy is None:
        return base
    torch.manual_seed(1)
    config = DeltaMemConfig(strategy=strategy, output_init="random", online_gain=2.0)
    return get_delta_mem_model(base, config).to(DEVICE).requires_grad_(False).eval()


def draw(rows, length, seed):
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def read(model, ids, memory=None):
    """(logits, memory, cache) of a prompt read and written at once."""
    cache = DynamicCache()
    more = {"memory": memory, "segment_ids": torch.zeros_like(ids)} if isinstance(model, DeltaMemModel) else {}
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True, **more)
    return out.logits, getattr(out, "memory", None), cache


@pytest.mark.parametrize(
    ("family", "strategy"), [*((f, "tsw") for f in PLAIN), ("qwen3", "ssw"), ("qwen3", "msw"), ("llama", None)]
)
def test_each_row_goes_on_as_if_alone(tiny_model, family, strategy):
    model, lengths, steps = build(tiny_model, family, strategy), [5, 2, 7], 6
    begun, asked = draw(1, 40, 0), [draw(1, length, 9 + length) for length in lengths]
    _, memory, cache = read(model, begun)
    prefix, reader = KeyValues.from_cache(cache), PrefixReader(model)
    padded = torch.cat([torch.nn.functional.pad(ids, (7 - ids.shape[1], 0)) for ids in asked])
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths], device=DEVICE)
    own, rows = DynamicCache(), memory and memory.select([0, 0, 0])
    segments = torch.zeros_like(padded)
    with torch.no_grad():
        logits, rows = reader.forward(prefix, padded, mask, own, rows, True, segments)
        first = logits[:, -1].argmax(-1)
        decoder = SlotDecoder(model, 4, 7 + steps + 1, prefix)
        decoder.fill([2, 0, 3], KeyValues.from_cache(own), first, rows, mask)
        decoded = [first.tolist()]
        for _ in range(steps):
            decoder.step()
            decoded.append(decoder.token[[2, 0, 3], 0].tolist())
    for row, (ids, slot) in enumerate(zip(asked, [2, 0, 3], strict=True)):
        # a beginning read at one go and a question after it, or ssw's segments would differ
        alone_cache, options = DynamicCache(), {}
        with torch.no_grad():
            for part in (begun, ids):
                if memory:
                    options = {"memory": options.get("memory"), "segment_ids": torch.zeros_like(part)}
                out = model(part, past_key_values=alone_cache, use_cache=True, **options)
                options["memory"] = getattr(out, "memory", None)
            torch.testing.assert_close(logits[row, 7 - ids.shape[1] :], out.logits[0], atol=2e-4, rtol=2e-4)
            for step in range(steps):
                token = out.logits[:, -1].argmax(-1)
                assert token.item() == decoded[step][row]
                more = {"memory": out.memory} if memory else {}
                out = model(token[:, None], past_key_values=alone_cache, use_cache=True, **more)
        torch.testing.assert_close(decoder.logits[slot], out.logits[0, -1], atol=2e-4, rtol=2e-4)
        if memory:
            taken = decoder.take(slot)[1]
            for i, state in out.memory.states.items():
                torch.testing.assert_close(taken.states[i], state, atol=2e-4, rtol=2e-4)


def test_nothing_written_leaves_the_memory(tiny_model):
    model = build(tiny_model, "qwen3", "tsw")
    _, memory, cache = read(model, draw(1, 20, 0))
    asked = draw(2, 4, 1)
    _, after = PrefixReader(model).forward(
        KeyValues.from_cache(cache), asked, torch.ones_like(asked), DynamicCache(), memory.select([0, 0]), False, None
    )
    assert isinstance(after, DeltaMemory)
    for i, state in memory.states.items():
        assert torch.equal(after.states[i], state.expand_as(after.states[i]))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_windows_and_caps_are_not_shared(tiny_model, family):
    base = tiny_model(family, "eager").to(DEVICE)
    assert not can_share_prefixes(base)
    prefix = KeyValues.from_cache(read(base, draw(1, 5, 0))[2])
    with pytest.raises(DeltaMemError, match="more than plain attention"):
        with_attention(base, PREFIXED)(
            draw(1, 1, 1), attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE), shared_prefix=prefix
        )


@pytest.mark.parametrize("family", PLAIN)
def test_plain_families_are_shared(tiny_model, family):
    assert can_share_prefixes(tiny_model(family))
