"""Compiling parts of the backbone changes its speed and nothing else."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.acceleration import compile_norms_and_mlps


def loss_and_gradients(base, lengths):
    torch.manual_seed(0)
    model = get_delta_mem_model(base, DeltaMemConfig())
    found = []
    for length in lengths:
        ids = torch.arange(3, 3 + 2 * length).view(2, length) % 101
        memory = model.write(ids)
        loss = model(ids, memory=memory, write=False, labels=ids, use_cache=False).loss
        found += [loss, *torch.autograd.grad(loss, list(model.memory_layers.parameters()))]
    model.unload()
    return found


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
def test_compiled_norms_and_mlps_give_the_same_loss_and_gradients(tiny_model, family):
    lengths = (9, 14, 30)
    expected = loss_and_gradients(tiny_model(family), lengths)
    compiler = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    got = loss_and_gradients(compile_norms_and_mlps(tiny_model(family), backend=compiler), lengths)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert 1 < compiler.frame_count <= 8  # for norms and MLPs, but not again for every length
