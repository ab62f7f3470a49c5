"""Which implementation computes: whether the Triton kernels can take a tensor, and what was asked for."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

RANKS = (4, 8, 16, 32)
"""Those the kernels are compiled for."""
MOST_WEIGHTS = 4
"""Weights that a row is multiplied by in one launch."""

VARIABLE = "DELTAMEM_BACKEND"
"""Environment variable that chooses the implementation for the whole process, as :func:`choose_backend` does."""
NAMES = ("naive", "torch", "triton")

_chosen: str | None = None


def choose_backend(name: str | None) -> None:
    """Compute with "naive", "torch" or "triton" from now on, whatever the environment says; None: as it says.

    For GPUs that Triton doesn't serve, and for comparing. "naive" and "torch" keep all kernels of this package off the
    GPU; "triton" insists on them.

    Raises:
        ValueError: no such implementation.
    """
    global _chosen
    _chosen = _known(name, "choose_backend") if name else None


def chosen_backend() -> str | None:
    """What was asked for, by :func:`choose_backend` or by the environment; None: whatever fits.

    Raises:
        ValueError: the environment names no implementation.
    """
    return _chosen or _known(os.environ.get(VARIABLE) or None, VARIABLE)


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}={name!r}: choose one of {', '.join(NAMES)}")
    return name


@cache
def triton_runs() -> bool:
    """Whether this machine has a GPU and Triton; CPU builds of torch have no driver to compile for."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def has_triton(x: Tensor) -> bool:
    """Whether kernels are to run on this tensor: it is on a GPU, Triton is there, and nothing else was asked for."""
    return x.is_cuda and kernels_chosen()


def kernels_chosen() -> bool:
    """Whether tensors on a GPU get the kernels; a compiler may take the answer for good."""
    return triton_runs() and chosen_backend() in (None, "triton")


def fits_triton(state: Tensor) -> bool:
    """Whether the Triton kernels can take this state: on a GPU, float32, of a rank they are compiled for."""
    return has_triton(state) and state.dtype == torch.float32 and state.shape[-1] in RANKS
