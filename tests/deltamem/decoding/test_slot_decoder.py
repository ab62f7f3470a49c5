"""Decoding in slots is generate(), row by row: lengths, memories, padding, comings and goings don't mix."""

import threading

import pytest
import torch
from transformers import DynamicCache

from deltamem import DeltaMemConfig, DeltaMemory, get_delta_mem_model
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.slot_decoder import SlotDecoder
from deltamem.errors import DeltaMemError
from tests.tiny_models import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(tiny_model, family="qwen3", strategy="tsw"):
    model = get_delta_mem_model(
        tiny_model(family, "eager" if family == "gemma2" else "sdpa").to(DEVICE), DeltaMemConfig(strategy=strategy)
    )
    with torch.no_grad():
        for layer in model.memory_layers.values():
            layer.in_proj.normal_(0, 0.4)
            for weight in layer.steer.values():
                weight.normal_(0, 0.1)
    return model.requires_grad_(False).eval()


def tokens(length, seed):
    return torch.randint(3, 101, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def used_memory(model, seed):
    generator = torch.Generator().manual_seed(seed)
    empty = model.new_memory(1)
    return DeltaMemory({i: torch.randn(s.shape, generator=generator).to(DEVICE) for i, s in empty.states.items()})


def read(model, ids, memory, write=True):
    """(keys, memory, likeliest next token) after a prompt."""
    cache = DynamicCache(config=model.base_model.config)
    segments = torch.zeros_like(ids)
    with torch.no_grad():
        out = model(ids, memory=memory, write=write, segment_ids=segments, past_key_values=cache, use_cache=True)
    return KeyValues.from_cache(cache), out.memory, out.logits[:, -1].argmax(-1)


def alone(model, ids, memory, write, count):
    """The same by ``generate``: its tokens, the last one's logits, and the memory after feeding all but the last."""
    out = model.generate(
        ids, memory=memory, write=write, segment_ids=torch.zeros_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), out.logits[-1][0], out.memory


@pytest.mark.parametrize(("family", "strategy"), [*((f, "tsw") for f in FAMILIES), ("qwen3", "ssw"), ("llama", "msw")])
def test_each_slot_decodes_as_if_alone(tiny_model, family, strategy):
    model, decoder = (m := build(tiny_model, family, strategy)), SlotDecoder(m, 3, 48)
    prompts, writes = [tokens(5, 1), tokens(17, 2), tokens(9, 3)], [True, True, False]
    expected, starts = [], []
    for slot, (ids, write) in enumerate(zip(prompts, writes, strict=True)):
        memory = used_memory(model, slot)
        expected.append(alone(model, ids, memory, write, 12))
        keys, memory, first = read(model, ids, memory, write)
        decoder.fill([slot], keys, first, memory, write=write)
        starts.append(first.tolist())
    for _ in range(11):
        decoder.step()
        for start, row in zip(starts, decoder.token.tolist(), strict=True):
            start += row
    assert starts == [sequence for sequence, _, _ in expected]
    for slot, (_, logits, memory) in enumerate(expected):
        torch.testing.assert_close(decoder.logits[slot], logits, rtol=1e-4, atol=1e-4)
        keys, mine = decoder.take(slot)
        assert keys.length == prompts[slot].shape[1] + 11
        for i, state in memory.states.items():
            torch.testing.assert_close(mine.states[i], state, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_of_a_slot_wherever_it_lies(tiny_model):
    model = build(tiny_model)
    ids, memory = tokens(8, 4), used_memory(model, 4)
    keys, after, first = read(model, ids, memory)
    place = torch.tensor([0, 2, 3, 4, 7, 8, 9, 11], device=DEVICE)
    mask = torch.zeros(1, 12, dtype=torch.long, device=DEVICE)
    mask[0, place] = 1

    def scattered(x):
        wide = torch.full((*x.shape[:2], 12, x.shape[3]), 9.0, device=DEVICE)
        wide[:, :, place] = x
        return wide

    padded = KeyValues(tuple((scattered(k), scattered(v)) for k, v in keys.layers))
    plain, other = SlotDecoder(model, 2, 32), SlotDecoder(model, 2, 32)
    plain.fill([1], keys, first, after)
    other.fill([1], padded, first, after, mask)
    for _ in range(3):
        torch.testing.assert_close(plain.step()[1], other.step()[1])
    assert other.take(1)[0].length == 11


def test_slots_are_taken_again_while_others_go_on(tiny_model):
    model, decoder = (m := build(tiny_model)), SlotDecoder(m, 2, 40)
    a, b, c = (read(model, tokens(6 + n, n), used_memory(model, n)) for n in (1, 2, 3))
    expected = {n: alone(model, tokens(6 + n, n), used_memory(model, n), True, 9)[0] for n in (1, 2, 3)}
    got = {1: [int(a[2])], 2: [int(b[2])], 3: [int(c[2])]}
    decoder.fill([0], a[0], a[2], a[1])
    for _ in range(2):
        decoder.step()
        got[1].append(int(decoder.token[0]))
    decoder.fill([1], b[0], b[2], b[1])
    for _ in range(3):
        decoder.step()
        got[1].append(int(decoder.token[0]))
        got[2].append(int(decoder.token[1]))
    decoder.free([0])
    decoder.fill([0], c[0], c[2], c[1])
    for _ in range(5):
        decoder.step()
        got[3].append(int(decoder.token[0]))
        got[2].append(int(decoder.token[1]))
    for n, sequence in got.items():
        assert sequence == expected[n][: len(sequence)], n


def test_generate_stops_each_row_at_its_limit_or_end(tiny_model):
    model = build(tiny_model)
    ids = torch.cat([tokens(6, 1), tokens(6, 2), tokens(6, 3)])
    cache = DynamicCache(config=model.base_model.config)
    with torch.no_grad():
        memory = model(ids[:, :-1], past_key_values=cache, use_cache=True).memory
    whole = [alone(model, ids[row : row + 1], None, True, 40)[0] for row in range(3)]
    end = {whole[0][20]}
    decoder = SlotDecoder(model, 4, 64)
    decoder.fill(range(3), KeyValues.from_cache(cache), ids[:, -1], memory)
    answers = decoder.generate([40, 5, 33], end)
    for answer, sequence, limit in zip(answers, whole, (40, 5, 33), strict=True):
        cut = next((i for i, token in enumerate(sequence) if token in end), limit)
        assert answer == sequence[: min(cut, limit)]


def test_the_bare_backbone_decodes_too(tiny_model):
    base = tiny_model("llama", "sdpa").to(DEVICE)
    ids = torch.cat([tokens(7, 1), tokens(7, 2)])
    decoder = SlotDecoder(base, 2, 32)
    decoder.prefill(ids)
    first = decoder.token.clone()
    answers = decoder.generate([10, 10], ())
    expected = base.generate(ids, max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 7:]
    assert torch.cat([first, torch.tensor(answers, device=DEVICE)], 1).tolist() == expected.tolist()
    assert base.config._attn_implementation == "sdpa"


def test_full_slots_are_errors(tiny_model):
    model, decoder = (m := build(tiny_model)), SlotDecoder(m, 1, 8)
    keys, memory, first = read(model, tokens(7, 1), None)
    decoder.fill([0], keys, first, memory)
    decoder.step()
    with pytest.raises(DeltaMemError, match="slots of 8 tokens are full"):
        decoder.step()
    with pytest.raises(DeltaMemError, match="leaves no room"):
        decoder.fill([0], read(model, tokens(8, 1), None)[0], first)


def test_a_full_slot_that_is_freed_does_not_stand_in_the_others_way(tiny_model):
    model, decoder = (m := build(tiny_model)), SlotDecoder(m, 2, 8)
    keys, memory, first = read(model, tokens(7, 1), None)
    decoder.fill([0], keys, first, memory)
    keys, memory, first = read(model, tokens(3, 2), None)
    decoder.fill([1], keys, first, memory)
    decoder.step()
    decoder.free([0])
    got = [int(first), int(decoder.token[1])]
    for _ in range(3):
        decoder.step()
        got.append(int(decoder.token[1]))
    assert got == alone(model, tokens(3, 2), None, True, 5)[0]


def test_a_step_leaves_the_model_to_other_threads(tiny_model):
    model, decoder = (m := build(tiny_model)), SlotDecoder(m, 1, 16)
    expected = read(model, tokens(6, 1), None)
    decoder.fill([0], expected[0], expected[2], expected[1])
    found = []

    def in_the_middle_of_a_step(*_):
        hook.remove()
        other = threading.Thread(target=lambda: found.append(read(model, tokens(6, 1), None)))
        other.start()
        other.join()

    hook = model.base_model.get_output_embeddings().register_forward_hook(in_the_middle_of_a_step)
    decoder._step()  # a replayed graph would run no hooks
    torch.testing.assert_close(found[0][0].layers, expected[0].layers)
    assert found[0][2].tolist() == expected[2].tolist()


def test_a_model_whose_layers_were_replaced_is_refused(tiny_model):
    model = build(tiny_model)
    layer = model.base_model.model.layers[0]
    layer.forward = layer.forward
    with pytest.raises(DeltaMemError, match="Qwen3DecoderLayer: its forward was replaced"):
        SlotDecoder(model, 1, 8)


def test_a_sequence_of_nothing_but_its_first_token(tiny_model):
    model, ids = build(tiny_model), tokens(1, 5)
    decoder = SlotDecoder(model, 1, 16)
    decoder.fill([0], KeyValues(), ids[0])
    expected = alone(model, ids, None, True, 6)[0]
    assert decoder.generate([6], ()) == [expected]


def test_a_lora_on_the_backbone_decodes_with_it(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama", "sdpa").to(DEVICE), LoraConfig(target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    ids = torch.cat([tokens(7, 1), tokens(7, 2)])
    decoder = SlotDecoder(model.eval(), 2, 32)
    decoder.prefill(ids)
    first = decoder.token.clone()
    answers = decoder.generate([10, 10], ())
    expected = model.generate(input_ids=ids, max_new_tokens=11, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat([first, torch.tensor(answers, device=DEVICE)], 1).tolist() == expected[:, 7:].tolist()
