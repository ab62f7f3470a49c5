"""The entry points of the recurrence, whichever backend computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from deltamem_kernels.chunk import chunk_delta_scan
from deltamem_kernels.device import chosen_backend, fits_triton, triton_runs
from deltamem_kernels.gates import gate_projections
from deltamem_kernels.gates import gated_read as _torch_gated_read
from deltamem_kernels.naive import naive_delta_scan
from deltamem_kernels.opaque import opaque_gated_delta_scan

# Under this length the chunk set-up costs more than the token loop.
SHORT = 4


def _torch_delta_scan(q, k, v, beta, state, mask=None) -> tuple[Tensor, Tensor]:
    scan = naive_delta_scan if q.shape[1] <= SHORT else chunk_delta_scan
    return scan(q, k, v, beta, state, mask)


def _torch_gated_delta_scan(projected, beta_bias, state, mask=None, scan=_torch_delta_scan) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() and scan is _torch_delta_scan:
        return opaque_gated_delta_scan(projected, beta_bias, state, mask)
    return scan(*gate_projections(projected, beta_bias, state.shape[1], state.shape[-1]), state, mask)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"naive": naive_delta_scan, "torch": _torch_delta_scan}
GATED_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": partial(_torch_gated_delta_scan, scan=naive_delta_scan),
    "torch": _torch_gated_delta_scan,
}
# CPU builds of torch come without a driver to compile for, and some without triton
if triton_runs():
    from deltamem_kernels.triton_scan import triton_delta_scan, triton_gated_delta_scan

    BACKENDS["triton"], GATED_BACKENDS["triton"] = triton_delta_scan, triton_gated_delta_scan


def _pick(backends: dict, backend: str | None, state: Tensor):
    name = backend or chosen_backend() or ("triton" if fits_triton(state) else "torch")
    if name == "triton" and name not in backends:
        raise ValueError("backend 'triton' needs a CUDA GPU and the package triton; choose 'torch' or 'naive'")
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose one of {sorted(backends)}")
    return backends[name]


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and write a state along T tokens (see :func:`deltamem_kernels.naive.naive_delta_scan`).

    Args:
        q, k, v, beta: [B, T, N, r]; q and k already normalised.
        state: [B, N, r, r], float32.
        mask: [B, T] bool or None; a masked token reads zero and writes nothing.
        backend: "naive", "torch", "triton", or None to pick.

    Returns:
        (reads [B, T, N, r], state [B, N, r, r]), in the state's dtype.
    """
    return _pick(BACKENDS, backend, state)(q, k, v, beta, state, mask)


def gated_delta_scan(
    projected: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`gate_projections` followed by :func:`delta_scan`; N and r are the state's.

    Args:
        projected: [B, T, 4·N·r], any float dtype.
        beta_bias: [N·r].
        state: [B, N, r, r], float32.
        mask: [B, T] bool or None.
    """
    return _pick(GATED_BACKENDS, backend, state)(projected, beta_bias, state, mask)


def gated_read(projected: Tensor, state: Tensor, mask: Tensor | None = None) -> Tensor:
    """Read one unchanging state along T tokens: r_t = S q_t, [B, T, N, r].

    On a GPU this is the scan with its gates shut: a dozen launches with its gradient, where written out it takes forty,
    and at the few tokens that are read it is launches that cost.

    Args:
        projected: [B, T, 4·N·r]; only q̃ matters.
        state: [B, N, r, r].
        mask: [B, T] bool or None; a masked token reads zero.
    """
    if fits_triton(state):
        width = state.shape[1] * state.shape[-1]
        compiling = torch.compiler.is_compiling()
        shut = _closed(projected.device, width) if compiling else _shut_gates(projected.device, width)
        return gated_delta_scan(projected, shut, state, mask, backend="triton")[0]
    reads = _torch_gated_read(projected, state)
    return reads if mask is None else reads * mask[:, :, None, None]


@lru_cache
def _shut_gates(device: torch.device, width: int) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor couldn't be saved for a backward pass
        return _closed(device, width)


def _closed(device: torch.device, width: int) -> Tensor:
    return torch.full((width,), -1e9, device=device)
