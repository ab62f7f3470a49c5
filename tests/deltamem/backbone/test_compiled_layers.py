"""Compiled layers train as plain ones, in as many programs as there are kinds of pass."""

import copy
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.compiled_layers import compile_layers

SIZES = [(2, 9), (3, 14), (2, 40)]
"""Texts and tokens of each batch; the longest takes the scan several chunks."""


def adapted(base, **config):
    torch.manual_seed(0)
    model = get_delta_mem_model(base, DeltaMemConfig(**config))
    with torch.no_grad():
        for parameter in model.memory_layers.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def write_and_read(model, texts, tokens, reads_write=False):
    """Losses, states and gradients of a text that is written, padding at its end, and a question that is read."""
    draw = torch.Generator().manual_seed(tokens)
    ids, asked = (torch.randint(3, 100, (texts, n), generator=draw) for n in (tokens, tokens // 2 + 2))
    mask = torch.arange(tokens) < torch.arange(tokens, tokens - texts, -1)[:, None]
    memory, gates = model.write_with_gates(ids, mask, right_padded=True)
    out = model(asked, memory=memory, write=reads_write, labels=asked, use_cache=False)
    loss = out.loss + 0.1 * gates.square().mean() + 0.1 * sum(s.square().mean() for s in out.memory.states.values())
    gradients = torch.autograd.grad(loss, list(model.memory_layers.parameters()))
    return [loss, gates, *out.memory.states.values(), *gradients]


def assert_equal(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("family", "reads_write", "config"),
    [
        ("qwen3", True, {"strategy": "tsw"}),
        ("phi3", False, {"strategy": "msw", "steer": ("q", "k", "v", "o"), "layers": (0, 2)}),
    ],
    ids=["tsw, asking writes", "msw, packed projections, a layer without"],
)
def test_losses_states_and_gradients_are_those_of_plain_layers(tiny_model, caplog, family, reads_write, config):
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("eager")
    plain = adapted(tiny_model(family, "sdpa"), **config)
    compiled = adapted(compile_layers(tiny_model(family, "sdpa"), backend=compiler), **config)
    frames = []
    for texts, tokens in SIZES:
        expected = write_and_read(plain, texts, tokens, reads_write)
        assert_equal(write_and_read(compiled, texts, tokens, reads_write), expected)
        frames.append(compiler.frame_count)
    assert frames == frames[:1] * len(SIZES)  # no length is compiled for
    assert not [r for r in caplog.records if r.name == "deltamem.backbone"]


def checkpointing(model):
    model.gradient_checkpointing_enable()
    model.train()


def hooked(model):
    model.base_model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output)


def replaced(model):
    for layer in model.base_model.model.layers:
        layer.mlp = copy.copy(layer.mlp)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(checkpointing, "computed again"), (hooked, "MLP has hooks of others"), (replaced, "were replaced")],
)
def test_what_cannot_be_compiled_runs_as_it_is_and_the_log_says_why_once(tiny_model, caplog, change, reason):
    plain, compiled = tiny_model("llama", "sdpa"), compile_layers(tiny_model("llama", "sdpa"), backend="eager")
    models = [adapted(base) for base in (plain, compiled)]
    with caplog.at_level(logging.WARNING, "deltamem.backbone"):
        for model in models:
            change(model)
        expected, got, again = (write_and_read(model, 2, 9) for model in (models[0], models[1], models[1]))
    assert_equal(got, expected)
    assert_equal(again, expected)
    (record,) = (r for r in caplog.records if r.name == "deltamem.backbone")
    assert reason in record.message


def test_segments_are_written_by_plain_layers(tiny_model, caplog):
    model = adapted(compile_layers(tiny_model("llama", "sdpa"), backend="eager"), strategy="ssw")
    ids = torch.arange(3, 21).view(2, 9)
    model.write(ids, segment_ids=torch.arange(9).expand(2, 9) // 3)
    assert "ssw writes as many segments" in caplog.text


def test_a_compiler_that_fails_is_not_asked_again(tiny_model, caplog):
    asked = []

    def failing(graph, inputs):
        asked.append(graph)
        raise RuntimeError("no compiler here")

    plain, model = adapted(tiny_model("llama", "sdpa")), adapted(tiny_model("llama", "sdpa"))
    compile_layers(model.base_model, backend=failing)
    for layer in model.base_model.model.layers:  # the norms and MLPs, which would fail as well
        for module in layer.modules():
            if module is not layer:
                module._compiled_call_impl = None
    assert_equal(write_and_read(model, 2, 9), write_and_read(plain, 2, 9))
    assert len(asked) == 1
    assert "no compiler here" in caplog.text


@pytest.mark.slow
def test_backward_passes_that_the_compiler_cuts_out_compute_the_same(tiny_model):
    torch._dynamo.reset()
    plain = adapted(tiny_model("llama", "sdpa"), strategy="msw")
    compiled = adapted(compile_layers(tiny_model("llama", "sdpa"), backend="aot_eager"), strategy="msw")
    for texts, tokens in SIZES[:2]:
        assert_equal(write_and_read(compiled, texts, tokens), write_and_read(plain, texts, tokens))
