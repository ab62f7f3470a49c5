"""Gradients reach the adapter through the write pass, and only the adapter."""

import pytest
import torch

from deltamem import DeltaMemConfig, DeltaMemory, get_delta_mem_model
from deltamem_kernels import gated_delta_scan

IDS = torch.tensor([[5, 9, 20, 33, 7, 8], [4, 4, 60, 2, 90, 11]])
QUESTION = torch.tensor([[3, 50, 12], [71, 8, 30]])
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)


def loss_of(model, memory=None):
    written = model.write(IDS, memory=memory, segment_ids=SEGMENTS)
    logits = model(QUESTION, memory=written, write=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), QUESTION[:, 1:].flatten())


def in_double(base):
    """The backbone in float64 throughout: transformers' RMSNorm would go through float32."""
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=1e-6)
            norm.weight.data.copy_(module.weight.data)
            base.set_submodule(name, norm)
    return base.double()


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_gradcheck_through_write_and_read(tiny_model, strategy):
    base = in_double(tiny_model("qwen3", "sdpa", num_hidden_layers=2))
    model = get_delta_mem_model(base, DeltaMemConfig(strategy=strategy, rank=2, num_states=2)).double()
    empty = DeltaMemory({i: s.double() for i, s in model.new_memory(2).states.items()})
    for layer in model.memory_layers.values():  # the paper's small gain would hide errors under the tolerance
        for weight in layer.steer.values():
            weight.data.normal_(0, 0.5)
        layer.in_proj.data.normal_(0, 0.5)
    names = ["memory_layers.0.in_proj", "memory_layers.0.beta_bias", "memory_layers.0.steer.q",
             "memory_layers.1.in_proj", "memory_layers.1.steer.o"]  # fmt: skip
    parameters = dict(model.named_parameters())

    def function(*values):
        return _with(model, names, values, empty)

    leaves = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, fast_mode=True)


def _with(model, names, values, memory):
    """The loss with some parameters replaced by ``values`` (write and read go through two methods)."""
    owners = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
    before = [owner[key] if isinstance(owner, torch.nn.ParameterDict) else getattr(owner, key) for owner, key in owners]
    try:
        for (owner, key), value in zip(owners, values, strict=True):
            owner._parameters[key] = value
        return loss_of(model, memory)
    finally:
        for (owner, key), value in zip(owners, before, strict=True):
            owner._parameters[key] = value


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_checkpointing_changes_no_gradient(tiny_model, strategy, selective, family):
    def gradients(checkpointing):
        torch.manual_seed(1)
        model = get_delta_mem_model(tiny_model(family, "sdpa"), DeltaMemConfig(strategy=strategy))
        if checkpointing:
            model.gradient_checkpointing_enable(selective=selective)
            model.train()
        written, gates = model.write_with_gates(IDS, segment_ids=SEGMENTS)
        loss = model(QUESTION, memory=written, write=False, labels=QUESTION).loss + gates.sum()
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    off, on = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in off.values())
    for name in off:
        torch.testing.assert_close(on[name], off[name], rtol=1e-5, atol=1e-7)


def test_only_the_adapter_is_trainable(tiny_model, capsys):
    model = get_delta_mem_model(tiny_model("qwen3"))
    loss_of(model).backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"memory_layers"}
    assert all(p.grad is None for p in model.base_model.parameters())
    first = model.memory_layers["0"]
    assert first.in_proj.grad.abs().sum() > 0 and first.beta_bias.grad.abs().sum() > 0
    model.print_trainable_parameters()
    assert "trainable%" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["tsw", "ssw"])
def test_every_part_of_a_new_adapter_learns_from_the_first_step(tiny_model, strategy):
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy=strategy))
    loss_of(model).backward()
    for layer in model.memory_layers.values():
        parts = [*layer.in_proj.grad.chunk(4), layer.beta_bias.grad, *(weight.grad for weight in layer.steer.values())]
        assert len(parts) == 7 and all(part.count_nonzero() for part in parts)


def test_states_whose_reads_begin_unused_are_taken_up_by_the_first_step(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy="msw"))
    loss_of(model).backward()
    for layer in model.memory_layers.values():
        first, *others = layer.in_proj.grad[:32].split(8)  # W_q, state by state
        assert first.count_nonzero() and not any(other.count_nonzero() for other in others)
        for weight in layer.steer.values():
            assert not weight[:, 8:].count_nonzero() and all(g.count_nonzero() for g in weight.grad.split(8, 1))


@pytest.mark.parametrize("strategy,millions", [("tsw", 4.87), ("ssw", 4.87), ("msw", 19.47)], ids=["tsw", "ssw", "msw"])
def test_parameter_count_is_the_papers(strategy, millions):
    """Qwen3-4B's shape: hidden 2,560, 36 layers, 32 heads of 128."""
    from deltamem.layer import DeltaMemLayer

    with torch.device("meta"):
        weights = {"q": torch.empty(4096, 2560), "o": torch.empty(2560, 4096)}
        layer = DeltaMemLayer(DeltaMemConfig(strategy=strategy, output_init="zero"), 2560, weights)
    assert round(36 * sum(p.numel() for p in layer.parameters()) / 1e6, 2) == millions


def test_float32_state_under_bf16_inputs_stays_close_to_float64_over_32k_tokens():
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(1, 32768, 32, generator=generator).bfloat16()
    bias, state = torch.full((8,), -1.5), torch.zeros(1, 1, 8, 8)
    reads, end = gated_delta_scan(projected, bias, state)
    exact_reads, exact_end = gated_delta_scan(projected.double(), bias.double(), state.double())
    assert reads.isfinite().all() and end.dtype == torch.float32
    assert (reads - exact_reads).norm() / exact_reads.norm() < 1e-5
    assert (end - exact_end).norm() / exact_end.norm() < 1e-5
