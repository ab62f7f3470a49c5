"""Whether the Triton kernels can take a tensor."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

RANKS = (4, 8, 16, 32)
"""Those the kernels are compiled for."""


@cache
def triton_runs() -> bool:
    """Whether this machine has a GPU and Triton; CPU builds of torch have no driver to compile for."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def has_triton(x: Tensor) -> bool:
    """Whether kernels can run on this tensor: it is on a GPU, and Triton is there."""
    return x.is_cuda and triton_runs()


def fits_triton(state: Tensor) -> bool:
    """Whether the Triton kernels can take this state: on a GPU, float32, of a rank they are compiled for."""
    return has_triton(state) and state.dtype == torch.float32 and state.shape[-1] in RANKS
