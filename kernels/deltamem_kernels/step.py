"""One token: what decoding runs in every layer, with as few kernel launches as possible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels.device import fits_triton, has_triton
from deltamem_kernels.gates import gate_projections
from deltamem_kernels.naive import naive_delta_scan
from deltamem_kernels.paged import torch_paged_step


def delta_step(
    x: Tensor,
    in_proj: Tensor,
    beta_bias: Tensor,
    state: Tensor,
    mask: Tensor | None = None,
    out_state: Tensor | None = None,
    writes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project, normalise, gate, read and write one token; one kernel on a GPU. Inference only.

    Args:
        x: [B, H], the attention's input.
        in_proj: [4·N·r, H], the blocks q | k | v | β.
        beta_bias: [N·r].
        state: [B, N, r, r] float32.
        mask: [B] bool or None; where False the read is zero and the state stays.
        out_state: where the new state goes (it may be ``state`` itself); None makes a new tensor.
        writes: [B] bool or None; where False the state is read and stays.

    Returns:
        reads [B, N, r] float32, the new state.
    """
    if fits_triton(state):
        from deltamem_kernels.triton_step import triton_delta_step

        return triton_delta_step(x, in_proj, beta_bias, state, mask, out_state, writes)
    projected = F.linear(x, in_proj.to(x.dtype)).unsqueeze(1)
    q, k, v, beta = gate_projections(projected, beta_bias, state.shape[1], state.shape[-1])
    if writes is not None:
        beta = beta * writes[:, None, None, None]
    reads, new_state = naive_delta_scan(q, k, v, beta, state, None if mask is None else mask.unsqueeze(1))
    return reads[:, 0], new_state if out_state is None else out_state.copy_(new_state)


def state_step(projected: Tensor, beta_bias: Tensor, state: Tensor, writes: Tensor) -> Tensor:
    """:func:`delta_step` of what is projected already, where a compiler puts the projection among others.

    Args:
        projected: [B, 4·N·r], the blocks q | k | v | β before they are normalised and gated.
        beta_bias: [N·r].
        state: [B, N, r, r] float32, changed in place.
        writes: [B] bool; where False the state is read and stays.

    Returns:
        reads [B, N·r] float32.
    """
    reads = state.new_empty(len(state), beta_bias.numel())
    if fits_triton(state):
        from deltamem_kernels.triton_paged import triton_paged_step

        triton_paged_step(projected, beta_bias, state, None, writes, reads)
    else:
        page = torch.arange(len(state), device=state.device)
        torch_paged_step(projected, beta_bias, state, page, writes, reads)
    return reads


def steer_(out: Tensor, reads: Tensor, weight: Tensor, scale: float) -> Tensor:
    """out [B, W] += scale · reads [B, N·r] · weightᵀ [N·r, W], in place; one kernel on a GPU."""
    width = weight.shape[1]
    if has_triton(out) and out.is_contiguous() and width & (width - 1) == 0:
        from deltamem_kernels.triton_step import triton_steer

        triton_steer(out, reads, weight, scale)
        return out
    return out.addmm_(reads.to(out.dtype), weight.to(out.dtype).t(), alpha=scale)
