"""A row times up to four weights in one launch: every program streams a few rows of one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamem_kernels.device import MOST_WEIGHTS

# Rows of a weight per program, and channels per round. A row's rounds are all on their way before the first is needed,
# and short programs, a dozen to a multiprocessor, leave the memory no pause.
ROWS = 1
BLOCK = 2048


@triton.jit
def products_kernel(x, out, w0, w1, w2, w3, n0, n1, n2, n3, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x [K], weights [n, K]; out [n0 + n1 + n2 + n3]. Grid: the blocks of ROWS rows of one weight after another's."""
    program = tl.program_id(0)
    first1 = tl.cdiv(n0, ROWS)
    first2 = first1 + tl.cdiv(n1, ROWS)
    first3 = first2 + tl.cdiv(n2, ROWS)
    weight, count, base, first = w0, n0, 0, 0
    if program >= first1:
        weight, count, base, first = w1, n1, n0, first1
    if program >= first2:
        weight, count, base, first = w2, n2, n0 + n1, first2
    if program >= first3:
        weight, count, base, first = w3, n3, n0 + n1 + n2, first3
    row, column = (program - first) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = row < count
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.static_range(0, K, BLOCK):
        there = k + column < K
        part = tl.load(x + k + column, mask=there, other=0.0).to(tl.float32)
        total += tl.load(at + k, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32) * part[None, :]
    tl.store(out + base + row, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("deltamem::row_products", mutates_args=())
def _products(x: Tensor, weights: list[Tensor]) -> Tensor:
    counts = [len(weight) for weight in weights]
    grid = (sum(triton.cdiv(count, ROWS) for count in counts),)
    missing = MOST_WEIGHTS - len(weights)
    out = x.new_empty(*x.shape[:-1], sum(counts))
    products_kernel[grid](
        x, out, *weights, *weights[-1:] * missing, *counts, *[0] * missing, x.shape[-1], ROWS, BLOCK, num_warps=4
    )
    return out


@_products.register_fake
def _(x, weights):
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))


def triton_row_products(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Same function as :func:`deltamem_kernels.products.row_products` on a GPU.

    Raises:
        ValueError: more than one row, too many weights, or weights that don't fit it.
    """
    width, fits = x.shape[-1], all(w.shape[1:] == x.shape[-1:] and w.dtype == x.dtype for w in weights)
    if x.numel() != width or len(weights) > MOST_WEIGHTS or not fits or not all(w.is_contiguous() for w in weights):
        raise ValueError(
            f"row_products needs one row and at most {MOST_WEIGHTS} contiguous weights [N, {width}] in {x.dtype}; got "
            f"{tuple(x.shape)} and {[(tuple(w.shape), w.dtype) for w in weights]}"
        )
    out = torch.ops.deltamem.row_products(x.contiguous(), list(weights))
    return list(out.split([len(weight) for weight in weights], -1))
