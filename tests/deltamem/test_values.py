"""Configs, memories, segments, chat templates and unsupported backbones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltamem import DeltaMemConfig, DeltaMemError, DeltaMemory, encode_messages, get_delta_mem_model
from deltamem.errors import ConfigError, MemoryMismatchError, SegmentsMissingError, UnsupportedModelError
from deltamem.segments import rank_segments, segment_means
from tests.tiny_models import plain_byte_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') %}{{ raise_exception('roles must "
    "alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
)


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,message",
    [
        ({"strategy": "xsw"}, "strategy must be one of tsw, ssw, msw; got 'xsw'"),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"alpha": "16"}, "alpha must be a number"),
        ({"steer": ()}, "steer must be a non-empty"),
        ({"steer": "qo"}, "steer must be a non-empty"),
        ({"steer": ("q", "x")}, "steer must be one of q, k, v, o; got 'x'"),
        ({"layers": (-1,)}, "layers must be None or non-negative"),
        ({"segment": "page"}, "segment must be one of"),
        ({"output_init": "ones"}, "output_init must be one of"),
    ],
)
def test_a_value_outside_its_domain_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        DeltaMemConfig(**values)


def test_config_defaults_round_trip_and_unknown_keys():
    assert DeltaMemConfig(strategy="msw").num_states == 4 and DeltaMemConfig().num_states == 1
    config = DeltaMemConfig(strategy="ssw", steer=("o", "k"), layers=(3, 1))
    assert config.steer == ("k", "o") and config.layers == (1, 3)
    assert DeltaMemConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown δ-mem option 'stratgy'; did you mean 'strategy'"):
        DeltaMemConfig.from_dict({"stratgy": "tsw"})


@pytest.mark.parametrize(
    ("init", "rank"), [("base_slice", 4), ("base_slice", 8), ("base_slice", 16), ("zero", 4), ("random", 4)]
)
def test_steering_starts_as_the_paper_says(tiny_model, init, rank):
    base = tiny_model("qwen3")
    model = get_delta_mem_model(base, DeltaMemConfig(strategy="msw", rank=rank, output_init=init))
    weight = base.model.layers[1].self_attn.o_proj.weight
    steer = model.memory_layers["1"].steer["o"]
    if init == "base_slice":
        # as many columns as the rank; the release's scripts take 8 whatever it is: the same at the paper's rank
        torch.testing.assert_close(steer[:, :rank], 0.05 * nn.functional.normalize(weight[:, :rank], dim=0))
        assert not steer[:, rank:].any()
    elif init == "zero":
        assert not steer.any()
    else:
        torch.testing.assert_close(steer.norm(dim=0), torch.full((4 * rank,), 0.05))
    layer, inputs = model.memory_layers["1"], 3 * 4 * rank
    assert not layer.in_proj[inputs:].any() and layer.in_proj[:inputs].all() and (layer.beta_bias == -1.5).all()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_saves_loads_selects_and_measures(tmp_path):
    memory = DeltaMemory({0: torch.randn(3, 2, 4, 4), 5: torch.randn(3, 2, 4, 4)}, {"adapter": "x"})
    memory.save(tmp_path / "m.safetensors")
    loaded = DeltaMemory.load(tmp_path / "m.safetensors")
    assert loaded.metadata == {"adapter": "x"} and list(loaded.states) == [0, 5]
    assert all(torch.equal(loaded.states[i], memory.states[i]) for i in (0, 5))
    twice = memory.select([2, 2, 0])
    assert torch.equal(twice.states[5][1], memory.states[5][2]) and twice.batch_size == 3
    assert torch.equal(DeltaMemory.cat([memory.select([0]), memory.select([1, 2])]).states[0], memory.states[0])
    assert memory.select([]).states[0].shape == (0, *memory.states[0].shape[1:])
    torch.testing.assert_close(memory.norms()[0][1, 1], memory.states[0][1, 1].norm())


def test_what_is_no_memory_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(MemoryMismatchError, match="not a saved memory"):
        DeltaMemory.load(tmp_path / "x")
    with pytest.raises(MemoryMismatchError, match="one .* state per layer"):
        DeltaMemory({0: torch.zeros(1, 1, 2, 2), 1: torch.zeros(2, 1, 2, 2)})


def test_a_memory_of_another_adapter_or_batch_is_refused(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3"))
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(MemoryMismatchError, match=r"\(2, 1, 8, 8\), this adapter and batch need \(1, 1, 8, 8\)"):
        model(ids, memory=model.new_memory(2))
    other = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(layers=(0,)))
    with pytest.raises(MemoryMismatchError, match="states for layers"):
        model(ids, memory=other.new_memory(1))
    with pytest.raises(DeltaMemError, match="2-D padding mask"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ConfigError, match="names layer 9, but the backbone has layers 0 to 2"):
        get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(layers=(9,)))


def test_the_adapter_can_be_switched_off_but_not_merged(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3")).eval()
    ids, memory = torch.tensor([[4, 5, 6]]), model.write(torch.tensor([[7, 8, 9]]))
    with model.disable_adapter(), torch.no_grad():
        out = model(ids, memory=memory)
        assert torch.equal(out.logits, model.base_model(ids).logits) and out.memory is memory
        assert torch.equal(
            model.generate(ids, max_new_tokens=3, do_sample=False),
            model.base_model.generate(ids, max_new_tokens=3, do_sample=False),
        )
    with torch.no_grad():
        assert not torch.equal(model(ids, memory=memory).logits, out.logits)
    with pytest.raises(DeltaMemError, match="can't be merged"):
        model.merge_and_unload()


def test_an_adapter_taken_off_leaves_the_backbone_as_it_was(tiny_model):
    base = tiny_model("qwen3")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()]
    assert get_delta_mem_model(base).unload() is base
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()] == hooks


# --- segments -------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(-1, 6), min_size=5, max_size=5), min_size=1, max_size=4))
def test_segment_means_are_the_means_of_the_segments(rows):
    ids = torch.tensor(rows)
    x = torch.randn(*ids.shape, 3, dtype=torch.float64)
    means, filled = segment_means(x, rank_segments(ids, None))
    for b, row in enumerate(rows):
        present = sorted({i for i in row if i >= 0})
        assert filled[b].tolist() == [n < len(present) for n in range(filled.shape[1])]
        for n, i in enumerate(present):
            expected = x[b][[j for j, value in enumerate(row) if value == i]].mean(0)
            torch.testing.assert_close(means[b, n], expected)


def test_ssw_does_not_guess_segments(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(strategy="ssw"))
    ids = torch.tensor([[4, 5, 6]])
    for function in (model, model.write):
        with pytest.raises(SegmentsMissingError, match="pass segment_ids"):
            function(ids)
    model(ids, write=False)
    with pytest.raises(SegmentsMissingError, match="must have input_ids' shape"):
        model.write(ids, segment_ids=torch.tensor([[0, 1]]))
    unwritten = model.write(ids, segment_ids=torch.full((1, 3), -1))
    assert all(not state.any() for state in unwritten.states.values())


# --- chat templates -------------------------------------------------------------------------------------------------


def parts(encoded, tokenizer):
    """{segment: its text}"""
    texts = {}
    for token, segment in zip(*encoded, strict=True):
        texts.setdefault(segment, []).append(token)
    return {s: tokenizer.decode(t) for s, t in texts.items()}


def test_messages_are_segments_and_scaffolding_is_none():
    tokenizer = plain_byte_tokenizer(CHATML)
    messages = [
        {"role": "system", "content": "Sys."},
        {"role": "user", "content": "Blue is blue."},
        {"role": "assistant", "content": "  Ünïcode — yes  "},
        {"role": "user", "content": "Blue is blue."},
    ]
    encoded = encode_messages(tokenizer, messages, add_generation_prompt=True)
    found = parts(encoded, tokenizer)
    assert [found[i] for i in range(3)] == ["Blue is blue.", "Ünïcode — yes", "Blue is blue."]
    assert "Sys." in found[-1] and found[-1].endswith("<|im_start|>assistant\n")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoded.input_ids) == rendered


def test_a_content_that_also_occurs_in_the_template_is_found_in_its_place():
    tokenizer = plain_byte_tokenizer(CHATML)
    messages = [{"role": "user", "content": "kind"}, {"role": "assistant", "content": "art"}]
    encoded = encode_messages(tokenizer, messages)
    text = tokenizer.decode(encoded.input_ids)  # bytes: positions in the text are positions of tokens
    assert [encoded.segment_ids.index(i) for i in (0, 1)] == [text.rindex("kind"), text.rindex("art<")]


def test_sentences_are_segments_on_request():
    tokenizer = plain_byte_tokenizer(CHATML)
    message = {"role": "user", "content": "One. Two is 2.5 long! (Three?)\n\nFour"}
    found = parts(encode_messages(tokenizer, [message], segment="sentence"), tokenizer)
    assert [found[i].strip() for i in range(4)] == ["One.", "Two is 2.5 long!", "(Three?)", "Four"]


def test_templates_that_want_alternating_roles_get_them_and_segments_survive():
    tokenizer = plain_byte_tokenizer(ALTERNATING)
    messages = [{"role": "user", "content": c} for c in ("first", "second", "third")]
    assert [parts(encode_messages(tokenizer, messages), tokenizer)[i] for i in range(3)] == ["first", "second", "third"]
    with pytest.raises(DeltaMemError, match="template refuses these messages.*alternate"):
        encode_messages(tokenizer, [{"role": "assistant", "content": "x"}])


def test_templates_that_change_the_text_and_tokenizers_without_one_are_errors():
    message = [{"role": "user", "content": "Hello"}]
    with pytest.raises(DeltaMemError, match="changed the text of message 0"):
        encode_messages(plain_byte_tokenizer("{{ messages[0]['content'] | upper }}"), message)
    with pytest.raises(DeltaMemError, match="no chat template"):
        encode_messages(plain_byte_tokenizer(None), message)


# --- backbones ------------------------------------------------------------------------------------------------------


def test_an_unsupported_backbone_is_told_what_is_missing(tiny_model):
    with pytest.raises(UnsupportedModelError, match="Linear has no get_decoder"):
        get_delta_mem_model(nn.Linear(2, 2))
    base = tiny_model("qwen3")
    del base.model.layers[1].self_attn.o_proj
    message = r"layers\[1\].self_attn .* has no output projection .*o_proj, dense"
    with pytest.raises(UnsupportedModelError, match=message):
        get_delta_mem_model(base)
    base = tiny_model("phi3")
    base.model.layers[0].self_attn.qkv_proj = nn.Linear(32, 60, bias=False)
    with pytest.raises(UnsupportedModelError, match="qkv_proj has 60 rows"):
        get_delta_mem_model(base)
