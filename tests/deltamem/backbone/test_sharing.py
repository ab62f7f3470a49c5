"""What hangs on a backbone: several adapters, copies, adapters taken off or switched off, caches of earlier calls."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from deltamem import DeltaMemConfig, DeltaMemError, DeltaMemModel, get_delta_mem_model
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.prefix import PrefixReader
from deltamem.decoding.slot_decoder import SlotDecoder
from deltamem.errors import AdapterFormatError

IDS = torch.tensor([[5, 9, 20, 33, 7, 8, 41, 3]])
NEXT = torch.tensor([[60, 61, 7]])


def adapted(base, strategy="tsw", seed=1, **config):
    """An adapter that steers strongly."""
    torch.manual_seed(seed)
    config = {"output_init": "random", "online_gain": 1.0, **config}
    model = get_delta_mem_model(base, DeltaMemConfig(strategy=strategy, **config))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def logits(model, strength=None):
    return model(NEXT, memory=model.write(IDS, strength=strength), strength=strength).logits


def hooks(base):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())


def test_adapters_on_one_backbone_do_not_touch_each_other(tiny_model):
    base = tiny_model("qwen3")
    models = [adapted(base, "tsw"), adapted(base, "msw", seed=2), adapted(base, "tsw", seed=3, layers=(0, 2))]
    alone = [
        adapted(tiny_model("qwen3"), "tsw"),
        adapted(tiny_model("qwen3"), "msw", seed=2),
        adapted(tiny_model("qwen3"), "tsw", seed=3, layers=(0, 2)),
    ]
    for shared, own in zip(models, alone, strict=True):
        assert torch.equal(logits(shared), logits(own))
        ids = shared.generate(NEXT, memory=shared.write(IDS), max_new_tokens=5, do_sample=False)
        assert torch.equal(ids, own.generate(NEXT, memory=own.write(IDS), max_new_tokens=5, do_sample=False))


def test_an_adapter_loaded_twice_is_the_adapter(tiny_model, tmp_path):
    base = tiny_model("qwen3")
    first = adapted(base)
    first.save_pretrained(tmp_path)
    again = [DeltaMemModel.from_pretrained(base, tmp_path) for _ in range(2)]
    assert all(torch.equal(logits(model), logits(first)) for model in again)


def test_an_adapter_taken_off_leaves_the_others_and_says_so_when_called(tiny_model, tmp_path):
    base = tiny_model("qwen3")
    bare, none = base(NEXT).logits, hooks(base)
    first, second = adapted(base), adapted(base, seed=2)
    before = logits(second)
    assert first.unload() is base
    assert torch.equal(logits(second), before)
    for call in (first, first.write, first.generate):
        with pytest.raises(DeltaMemError, match="taken off its backbone by unload"):
            call(NEXT)
    first.save_pretrained(tmp_path)
    second.unload()
    assert hooks(base) == none and torch.equal(base(NEXT).logits, bare)
    assert torch.equal(logits(DeltaMemModel.from_pretrained(base, tmp_path)), logits(adapted(tiny_model("qwen3"))))


def test_an_adapter_that_does_not_fit_leaves_nothing_on_the_backbone(tiny_model, tmp_path):
    adapted(tiny_model("qwen3", hidden_size=64)).save_pretrained(tmp_path)
    base = tiny_model("qwen3")
    with pytest.raises(AdapterFormatError, match="has shape"):
        DeltaMemModel.from_pretrained(base, tmp_path)
    assert hooks(base) == 0


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_a_copied_model_is_another_one(tiny_model, strategy):
    model = adapted(tiny_model("phi3"), strategy)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for layer in twin.memory_layers.values():
            for weight in layer.steer.values():
                weight.zero_()
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(twin), twin.base_model(NEXT).logits)  # what it reads is its own adapter
    twin.unload()
    assert torch.equal(logits(model), before)


def test_a_model_survives_torch_save(tiny_model, tmp_path):
    model = adapted(tiny_model("qwen3"))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


def test_writing_sees_what_is_replaced_in_the_backbone(tiny_model):
    model = adapted(tiny_model("qwen3"))
    before = model.write(IDS)
    embeddings = nn.Embedding(101, 32)
    model.base_model.set_input_embeddings(embeddings)
    with torch.no_grad():
        after, passed = model.write(IDS), model(IDS).memory
    for i in before.states:
        torch.testing.assert_close(after.states[i], passed.states[i])
        assert not torch.allclose(after.states[i], before.states[i])


@torch.no_grad()
def slot_logits(model, memory, **options):
    """Of two tokens fed in a slot after NEXT has been read there."""
    cache = DynamicCache()
    model(NEXT, memory=memory, past_key_values=cache, use_cache=True, **options)
    decoder = SlotDecoder(model, 2, 16)
    decoder.fill([1], KeyValues.from_cache(cache), torch.tensor([11]), memory, **options)
    return [decoder.step()[1].clone() for _ in range(2)]


@torch.no_grad()
def prefix_logits(model, memory, **options):
    base = model.base_model
    prefix = KeyValues.from_cache(base(IDS, use_cache=True).past_key_values)
    ids = NEXT.expand(2, -1)
    mask, memory = torch.ones_like(ids), memory.select([0, 0])
    return PrefixReader(model).forward(prefix, ids, mask, DynamicCache(), memory, True, None, **options)


def test_a_disabled_adapter_reads_and_writes_nothing_anywhere(tiny_model):
    model, frozen = adapted(tiny_model("qwen3")), adapted(tiny_model("qwen3"), output_init="zero")
    memory = model.write(IDS)
    expected = frozen.generate(NEXT, max_new_tokens=6, do_sample=False)
    steered = slot_logits(model, memory)
    with model.disable_adapter():
        out = model(NEXT, memory=memory)
        assert torch.equal(out.logits, model.base_model(NEXT).logits) and out.memory is memory
        assert model(NEXT).memory.norms()[0].sum() == 0
        assert model.write(NEXT, memory=memory) is memory
        out = model.generate(
            NEXT, memory=memory, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, num_return_sequences=1
        )
        assert torch.equal(out.sequences, expected)
        assert all(torch.equal(out.memory.states[i], memory.states[i]) for i in memory.states)
        for disabled, bare in zip(slot_logits(model, memory), slot_logits(frozen, memory), strict=True):
            torch.testing.assert_close(disabled, bare)
        (read, after), (bare, _) = prefix_logits(model, memory), prefix_logits(frozen, memory)
        torch.testing.assert_close(read, bare)
        assert torch.equal(after.states[0], memory.select([0, 0]).states[0])
        with pytest.raises(DeltaMemError, match="no gates"):
            model.write_with_gates(NEXT)
    assert all(torch.equal(a, b) for a, b in zip(slot_logits(model, memory), steered, strict=True))


def test_what_generate_returns_leaves_the_bare_backbone_bare(tiny_model):
    model = adapted(tiny_model("qwen3"))
    out = model.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    states = {i: state.clone() for i, state in out.memory.states.items()}
    cache = copy.deepcopy(out.past_key_values)
    plain = DynamicCache()
    for i, layer in enumerate(cache.layers):
        plain.update(layer.keys, layer.values, i)
    step = out.sequences[:, -1:]
    with torch.no_grad():
        bare = model.base_model(step, past_key_values=plain).logits
        assert torch.equal(model.base_model(step, past_key_values=out.past_key_values).logits, bare)
        with model.disable_adapter():
            assert torch.equal(model(step, past_key_values=cache).logits, bare)
    assert all(torch.equal(states[i], out.memory.states[i]) for i in states)


def test_a_judge_that_reads_in_between_has_no_part_in_the_memory(tiny_model):
    model = adapted(tiny_model("qwen3"))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    alone = model.generate(NEXT, memory=model.write(IDS), **options)

    def judge(ids, scores):
        bare = model.base_model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, bare)
            model.base_model.generate(IDS, max_new_tokens=2, do_sample=False, eos_token_id=None)
        model.generate(IDS, max_new_tokens=2, do_sample=False, eos_token_id=None)
        return scores

    judged = model.generate(NEXT, memory=model.write(IDS), logits_processor=[judge], **options)
    assert torch.equal(judged.sequences, alone.sequences)
    assert all(torch.equal(judged.memory.states[i], alone.memory.states[i]) for i in alone.memory.states)


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_without_strength_it_is_the_frozen_backbone_and_at_one_as_trained(tiny_model, family, strategy):
    model = adapted(tiny_model(family), strategy)
    memory = model.write(IDS)
    bare = model.base_model
    with torch.no_grad():
        assert torch.equal(model(NEXT, memory=memory, strength=0).logits, bare(NEXT).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(NEXT, memory=memory, strength=0, **greedy), bare.generate(NEXT, pad_token_id=0, **greedy)
    )
    as_trained = logits(model)
    assert torch.equal(logits(model, 1), as_trained)
    assert (logits(model, 2) - as_trained).abs().max() > 1e-3
    model.strength = 0.5
    assert torch.equal(logits(model), logits(model, 0.5)) and torch.equal(logits(model, 1.0), as_trained)
    model.strength = 0
    assert torch.equal(logits(model), bare(NEXT).logits)


def test_each_slot_and_each_prefix_pass_has_its_own_strength(tiny_model):
    model, frozen = adapted(tiny_model("qwen3")), adapted(tiny_model("qwen3"), output_init="zero")
    memory = model.write(IDS)
    cache = DynamicCache()
    with torch.no_grad():
        model(NEXT, memory=memory, past_key_values=cache, use_cache=True)
    keys, first = KeyValues.from_cache(cache), torch.tensor([11])
    alone = {}
    for strength in (0.0, 1.0, 0.5):
        decoder = SlotDecoder(model, 1, 16)
        decoder.fill([0], keys, first, memory, strength=strength)
        alone[strength] = [decoder.step()[0].clone() for _ in range(2)]
    together = SlotDecoder(model, 3, 16)
    for slot, strength in enumerate(alone):
        together.fill([slot], keys, first, memory, strength=strength)
    for step in range(2):
        rows = together.step()
        for slot, strength in enumerate(alone):
            torch.testing.assert_close(rows[slot], alone[strength][step])
    assert (alone[0.0][0] - alone[1.0][0]).abs().max() > 1e-3
    torch.testing.assert_close(prefix_logits(model, memory, strength=0.0)[0], prefix_logits(frozen, memory)[0])


@pytest.mark.parametrize("strength", ["2", True, float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(tiny_model, strength):
    model = adapted(tiny_model("qwen3"))
    with pytest.raises(DeltaMemError, match="strength must be a finite number"):
        model(NEXT, strength=strength)
