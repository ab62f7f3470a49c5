"""A full GPU is told from other failures, and what to change is said."""

import pytest
import torch

from pipelines.errors import StageError
from pipelines.training.gpu_memory import room_on_gpu

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 432.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 259.06 MiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


def test_a_full_gpu_names_what_needs_less():
    with pytest.raises(StageError, match=r"^CUDA out of memory.*is free\. Lower train\.micro_batch_size") as raised:
        with room_on_gpu():
            raise torch.OutOfMemoryError(TORCH_SAYS)
    assert "PYTORCH_CUDA" not in str(raised.value)


def test_other_failures_pass_as_they_are():
    with pytest.raises(RuntimeError, match="^capture failed$"), room_on_gpu():
        raise RuntimeError("capture failed")


@pytest.mark.gpu
def test_what_torch_raises_on_a_gpu_is_that():
    with pytest.raises(StageError, match="Tried to allocate"), room_on_gpu():
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
