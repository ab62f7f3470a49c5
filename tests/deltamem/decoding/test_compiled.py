"""Compiled layers decode what the written-out ones do, with one program for all layers of a kind."""

from contextlib import contextmanager

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.chat.reply import TurnOptions
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.session import reply_pieces
from deltamem.chat.turn import Turn
from deltamem.decoding import compiled
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.slot_decoder import SlotDecoder
from tests.tiny_models import make_chat_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"qwen3": 1, "qwen2": 1, "phi3": 1, "gemma2": 2}
"""Families, and of how many kinds their layers are: with a window or not."""


@pytest.fixture
def programs(monkeypatch):
    """What is traced, run as it is: generating code for it takes longer than all these tests."""
    traced = []

    def run_as_traced(graph, inputs):
        compiled.join_products(graph.graph)
        graph.recompile()
        traced.append(graph)
        return graph.forward

    with _fresh():
        monkeypatch.setattr(compiled, "_backend", run_as_traced)
        yield traced


@contextmanager
def _fresh():
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def build(base, strategy="tsw", **config):
    torch.manual_seed(1)
    model = get_delta_mem_model(base.to(DEVICE), DeltaMemConfig(strategy=strategy, output_init="random", **config))
    with torch.no_grad():
        for layer in model.memory_layers.values():
            layer.in_proj.normal_(0, 0.4)
    return model.requires_grad_(False).eval()


def decoded(model, rows, compile_layers, steps=6, **fill):
    """(tokens, last logits, states) after a prompt and some steps."""
    decoder = SlotDecoder(model, rows, 32, compiled=compile_layers)
    decoder.prefill(torch.randint(3, 101, (rows, 9), generator=torch.Generator().manual_seed(2)).to(DEVICE))
    if fill:
        keys, memory = decoder.take(rows - 1)
        decoder.fill([rows - 1], keys, decoder.token[-1].clone(), memory, **fill)
    tokens = []
    for _ in range(steps):
        decoder.step()
        tokens.append(decoder.token.clone())
    states = decoder.memory.states if decoder.memory else {}
    return torch.cat(tokens, 1), decoder.logits, states


def assert_same(got, expected):
    assert got[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    for i, state in expected[2].items():
        torch.testing.assert_close(got[2][i], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "kinds"), KINDS.items())
def test_layers_of_a_kind_share_one_program(tiny_model, programs, family, kinds):
    model = build(tiny_model(family, "eager" if family == "gemma2" else "sdpa"))
    for rows in (1, 3):
        assert_same(decoded(model, rows, True), decoded(model, rows, False))
    assert len(programs) == 2 * kinds  # one row, and several
    decoded(model, 2, True)
    assert len(programs) == 2 * kinds


def test_one_row_is_multiplied_by_all_weights_it_meets_at_once(tiny_model, programs):
    base = tiny_model("qwen3", "sdpa")
    decoded(base.to(DEVICE), 1, True)
    decoded(build(base), 1, True)
    products = [
        [len(node.args[1]) for node in graph.graph.nodes if node.target is compiled.row_products] for graph in programs
    ]
    assert products == [[3, 1, 2, 1], [4, 1, 2, 1]]  # (memory,) q, k, v; o; gate, up; down


def test_layers_without_a_memory_and_sequences_of_their_own_strength(tiny_model, programs):
    model = build(tiny_model("llama", "sdpa"), "msw", layers=(0, 2), steer=("k", "v", "o"))
    fill = {"strength": 0.4, "write": False}
    assert_same(decoded(model, 2, True, **fill), decoded(model, 2, False, **fill))
    with model.disable_adapter():
        assert_same(decoded(model, 2, True), decoded(model, 2, False))


def test_an_empty_sequence_and_another_adapter_on_the_same_backbone(tiny_model, programs):
    base = tiny_model("llama", "sdpa")
    first, second = build(base), build(base, alpha=3.0)
    for model in (first, second):
        decoders = [SlotDecoder(model, 1, 16, compiled=compiled) for compiled in (True, False)]
        for decoder in decoders:
            decoder.fill([0], KeyValues(), torch.tensor([5], device=DEVICE))
        assert decoders[0].generate([8], ()) == decoders[1].generate([8], ())


def test_a_lora_on_the_backbone_whose_products_follow_one_another(tiny_model, programs):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama", "sdpa").to(DEVICE), LoraConfig(target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    assert_same(decoded(model.eval(), 1, True), decoded(model, 1, False))


def test_chats_reply_the_same_through_compiled_layers(programs, caplog):
    question, texts = [{"role": "user", "content": "Who are you?"}], []
    for compile_layers in (True, False):
        runtime = ChatRuntime(*make_chat_model(), compiled=compile_layers)
        turn = Turn(runtime, runtime.new_state(), question, TurnOptions(max_new_tokens=8))
        texts.append("".join(reply_pieces(turn)))
    assert texts[0] == texts[1] != ""
    assert len(programs) == 1
    assert "compiling the layers for 1 slots" in caplog.text


@pytest.mark.slow
def test_generated_code_decodes_the_same(tiny_model):
    model = build(tiny_model("qwen3", "sdpa"))
    with _fresh():
        for rows in (1, 2):
            assert_same(decoded(model, rows, True), decoded(model, rows, False))
