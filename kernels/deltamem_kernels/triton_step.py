"""One token in one kernel: project, normalise, gate, read, write. And the steer that follows, for decoding.

Programs hand nothing to each other and allocate nothing, so a CUDA graph can replay them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamem_kernels.triton_tiles import inverse_norm, sigmoid, tanh

# r × hidden channels per round of the projection: 16 warps hold a round in registers, and read ahead.
TILE = 2048
# Outputs of the steer per program.
STEER_BLOCK = 128


@triton.jit
def project(x, weight, H: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """weight rows [OUT, 1] of pointers times x [H], in float32."""
    total = tl.zeros((OUT, BLOCK), tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        part = tl.load(x + h, mask=h < H, other=0.0).to(tl.float32)
        total += tl.load(weight + h[None, :], mask=(h < H)[None, :], other=0.0).to(tl.float32) * part[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def step_kernel(x, in_proj, bias, state, mask, writes, reads, new_state, N, H: tl.constexpr, R: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, CHOSEN: tl.constexpr):  # fmt: skip
    """x [B, H], in_proj [4·N·r, H] (q | k | v | β, each N blocks of r). Grid (B, N, r / ROWS).

    Every program projects q and k for itself and v and β for its own state rows: the copies are cheaper than
    handing anything from one program to another, and four programs read their weights faster than one.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    first = tl.program_id(2) * ROWS
    x += b * H
    both = tl.arange(0, 2 * R)
    rows = (both // R) * (N * R) + n * R + both % R
    bent = tanh(tl.reshape(project(x, in_proj + rows[:, None] * H, H, 2 * R, BLOCK), (2, R)))
    unit = bent * inverse_norm(bent)
    both = tl.arange(0, 2 * ROWS)
    rows = (2 + both // ROWS) * (N * R) + n * R + first + both % ROWS
    own = tl.reshape(project(x, in_proj + rows[:, None] * H, H, 2 * ROWS, BLOCK), (2, ROWS))

    which = tl.arange(0, 2)[:, None]
    i = first + tl.arange(0, ROWS)
    query, key = tl.sum(tl.where(which == 0, unit, 0.0), axis=0), tl.sum(tl.where(which == 1, unit, 0.0), axis=0)
    value, gate = tl.sum(tl.where(which == 0, own, 0.0), axis=0), tl.sum(tl.where(which == 1, own, 0.0), axis=0)
    beta = sigmoid(gate + tl.load(bias + n * R + i).to(tl.float32))
    cell = (b * N + n) * (R * R) + i[:, None] * R + tl.arange(0, R)[None, :]
    s = tl.load(state + cell)
    read = tl.sum(s * query[None, :], axis=1)
    if MASKED:
        valid = tl.load(mask + b) != 0
        read = tl.where(valid, read, 0.0)
        beta = tl.where(valid, beta, 0.0)
    if CHOSEN:
        beta = tl.where(tl.load(writes + b) != 0, beta, 0.0)
    correction = beta * (value - tl.sum(s * key[None, :], axis=1))
    tl.store(reads + (b * N + n) * R + i, read)
    tl.store(new_state + cell, s * (1.0 - beta)[:, None] + correction[:, None] * key[None, :])


@triton.jit
def steer_kernel(out, reads, weight, scale, WIDTH, NR: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, WIDTH] += scale · reads [B, N·r] · weight [WIDTH, N·r]ᵀ. Grid (blocks of WIDTH, B)."""
    b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < WIDTH
    c = tl.arange(0, NR)
    w = tl.load(weight + o[:, None] * NR + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    read = tl.load(reads + b * NR + c).to(tl.float32)
    at = out + b * WIDTH + o
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (before + scale * tl.sum(w * read[None, :], axis=1)).to(out.dtype.element_ty), mask=inside)


def block_for(rank: int) -> int:
    """Hidden channels per round."""
    return min(512, TILE // rank)


@torch.library.custom_op("deltamem::step", mutates_args={"reads", "new_state"})
def _step(
    x: Tensor, in_proj: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None, writes: Tensor | None,
    reads: Tensor, new_state: Tensor,
) -> None:  # fmt: skip
    batch, states, rank, _ = state.shape
    step_kernel[(batch, states, 4)](
        x, in_proj, beta_bias, state, mask, writes, reads, new_state, states, x.shape[1], rank, rank // 4,
        block_for(rank), mask is not None, writes is not None, num_warps=16,
    )  # fmt: skip


@torch.library.custom_op("deltamem::steer", mutates_args={"out"})
def _steer(out: Tensor, reads: Tensor, weight: Tensor, scale: float) -> None:
    batch, width = out.shape
    grid = (triton.cdiv(width, STEER_BLOCK), batch)
    steer_kernel[grid](out, reads, weight, scale, width, weight.shape[1], STEER_BLOCK, num_warps=4)


def triton_delta_step(
    x: Tensor, in_proj: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None = None,
    out_state: Tensor | None = None, writes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same function as :func:`deltamem_kernels.step.delta_step` on a GPU.

    Raises:
        ValueError: shapes that don't fit together, a rank under 4, or a state that is not float32.
    """
    batch, states, rank, _ = state.shape
    if (
        state.dtype != torch.float32
        or rank < 4
        or in_proj.shape != (4 * states * rank, x.shape[-1])
        or x.shape[0] != batch
    ):
        raise ValueError(
            f"delta_step needs x [B, H], in_proj [4·N·r, H] and a float32 state [B, N, r, r]; got {tuple(x.shape)}, "
            f"{tuple(in_proj.shape)} and {state.dtype} {tuple(state.shape)}"
        )
    reads = state.new_empty(batch, states, rank)
    new_state = torch.empty_like(state) if out_state is None else out_state
    torch.ops.deltamem.step(
        x.contiguous(), in_proj.contiguous(), beta_bias, state.contiguous(), mask, writes, reads, new_state
    )
    return reads, new_state


def triton_steer(out: Tensor, reads: Tensor, weight: Tensor, scale: float) -> None:
    """In place: out [B, W] += scale · reads [B, N·r] · weight [W, N·r]ᵀ, in float32; N·r a power of two."""
    torch.ops.deltamem.steer(out, reads, weight, scale)
