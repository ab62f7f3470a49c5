"""One token of each of many sequences whose states lie in pages, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamem_kernels.triton_tiles import inverse_norm, sigmoid, tanh


@triton.jit
def paged_step_kernel(projected, bias, pages, page, writes, reads, page_stride, N, R: tl.constexpr,
                      CHOSEN: tl.constexpr, PAGED: tl.constexpr):  # fmt: skip
    """projected [B, 4·N·r] (q | k | v | β, each N blocks of r), pages [P, N, r, r]. Grid (B, N)."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    i = tl.arange(0, R)
    block = projected + b * (4 * N * R) + n * R + i
    query = tanh(tl.load(block[None, :]).to(tl.float32))  # [1, r], as is the key
    key = tanh(tl.load(block[None, :] + N * R).to(tl.float32))
    query *= inverse_norm(query)
    key *= inverse_norm(key)
    value = tl.load(block + 2 * N * R).to(tl.float32)
    beta = sigmoid(tl.load(block + 3 * N * R).to(tl.float32) + tl.load(bias + n * R + i).to(tl.float32))
    if CHOSEN:
        beta = tl.where(tl.load(writes + b) != 0, beta, 0.0)
    at = tl.load(page + b).to(tl.int64) if PAGED else b
    cell = pages + at * page_stride + n * (R * R) + i[:, None] * R + i[None, :]
    s = tl.load(cell)
    tl.store(reads + (b * N + n) * R + i, tl.sum(s * query, axis=1))
    correction = beta * (value - tl.sum(s * key, axis=1))
    tl.store(cell, s * (1.0 - beta)[:, None] + correction[:, None] * key)


@torch.library.custom_op("deltamem::paged_step", mutates_args={"pages", "reads"})
def _paged_step(
    projected: Tensor, beta_bias: Tensor, pages: Tensor, page: Tensor | None, writes: Tensor | None, reads: Tensor
) -> None:
    _, states, rank, _ = pages.shape
    paged_step_kernel[(projected.shape[0], states)](
        projected, beta_bias, pages, page, writes, reads, pages.stride(0), states, rank, writes is not None,
        page is not None, num_warps=1,
    )  # fmt: skip


def triton_paged_step(
    projected: Tensor, beta_bias: Tensor, pages: Tensor, page: Tensor | None, writes: Tensor | None, reads: Tensor
) -> None:
    """Same function as :func:`deltamem_kernels.paged.paged_step`; a page is read and written by one sequence only.

    ``page`` may be None: sequence i has page i.
    """
    torch.ops.deltamem.paged_step(projected.contiguous(), beta_bias, pages, page, writes, reads)
