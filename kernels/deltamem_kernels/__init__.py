"""δ-mem's recurrence: a gated delta rule on small states, read before write.

Three backends compute the same function: ``naive`` is the definition, ``torch`` is chunked PyTorch for any
device, ``triton`` is for GPUs. ``backend=None`` takes triton on CUDA tensors and torch elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from deltamem_kernels.chunk import chunk_delta_scan
from deltamem_kernels.gates import gate_projections
from deltamem_kernels.naive import naive_delta_scan
from deltamem_kernels.step import delta_step, steer_

__all__ = ["BACKENDS", "delta_scan", "delta_step", "gate_projections", "gated_delta_scan", "steer_"]

# Under this length the chunk set-up costs more than the token loop.
SHORT = 4


def _torch_delta_scan(q, k, v, beta, state, mask=None) -> tuple[Tensor, Tensor]:
    scan = naive_delta_scan if q.shape[1] <= SHORT else chunk_delta_scan
    return scan(q, k, v, beta, state, mask)


BACKENDS = {"naive": naive_delta_scan, "torch": _torch_delta_scan}


def _scan(backend: str | None):
    name = backend or "torch"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {sorted(BACKENDS)}")
    return BACKENDS[name]


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
    return _scan(backend)(q, k, v, beta, state, mask)


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
    q, k, v, beta = gate_projections(projected, beta_bias, state.shape[1], state.shape[-1])
    return delta_scan(q, k, v, beta, state, mask, backend=backend)
