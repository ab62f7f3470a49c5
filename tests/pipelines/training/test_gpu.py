"""A training pass never waits for the device, whatever the lengths of its episodes."""

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.training.batches import EpisodeBatch
from pipelines.training.objective import MemoryObjective


def episode_batch() -> EpisodeBatch:
    """Two contexts of unequal length, the first in two segments, with one question each."""
    return EpisodeBatch(
        context_ids=torch.arange(3, 43).view(2, 20),
        segment_ids=torch.tensor([[0] * 10 + [1] * 10, [0] * 12 + [-1] * 8]),
        context_mask=torch.arange(20) < torch.tensor([[20], [12]]),
        input_ids=torch.arange(50, 64).view(2, 7),
        answer_rows=torch.tensor([0, 0, 1]),
        answer_columns=torch.tensor([4, 5, 2]),
        answer_ids=torch.tensor([55, 56, 60]),
        answer_weights=torch.tensor([0.25, 0.25, 0.5]),
        owner=torch.tensor([0, 1]),
        papers=["first", "second"],
        tokens=46,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "smollm3"])
def test_no_pass_waits_for_the_device(tiny_model, family, strategy):
    model = get_delta_mem_model(tiny_model(family, "sdpa").cuda(), DeltaMemConfig(strategy=strategy))
    objective, batch = MemoryObjective(model, 0.01, 0.05), episode_batch().to(torch.device("cuda"))
    objective(batch).loss.backward()  # compiles the kernels
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_loss_and_gradients(tiny_model):
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig())
    objective, batch = MemoryObjective(model, 0.01, 0.05), episode_batch()
    loss = objective(batch).loss
    expected = torch.autograd.grad(loss, list(objective.parameters()))
    on_gpu = get_delta_mem_model(tiny_model("qwen3", "sdpa").cuda(), DeltaMemConfig())
    on_gpu.memory_layers.load_state_dict(model.memory_layers.state_dict())
    objective = MemoryObjective(on_gpu, 0.01, 0.05)
    moved = objective(batch.to(torch.device("cuda"))).loss
    torch.testing.assert_close(moved.cpu(), loss, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(moved, list(objective.parameters())), expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-2, atol=1e-5)
