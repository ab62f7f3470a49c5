"""Decoding attention: keys cut into runs that programs read side by side, then the runs' results combined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamem_kernels.triton_tiles import tanh

# Keys per round; 64 × 128 channels of bf16 are 16 KiB in flight per program and tensor.
BLOCK = 64
# Programs to aim at: one for every multiprocessor of an H200, and up to two, as runs are a power of two. At 4,096 keys
# twice as many took 3 % longer there for 1 row, 11 % for 8 and 13 % for 32.
PROGRAMS = 132
# A matrix product takes no fewer rows or channels than this; smaller groups and heads are filled up to it.
LEAST_ROWS = 16


@triton.jit
def attend_kernel(query, keys, values, lengths, sums, stats, scale, H, GROUP, L, WINDOW, CAP, D: tl.constexpr,
                  ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr,
                  CAPPED: tl.constexpr):  # fmt: skip
    """query [B·H, GROUP, D], keys and values [B·H, L, D]; sums [B·H, GROUP, RUNS, WIDTH], stats [2, B·H, GROUP, RUNS].

    Grid (B·H, RUNS). Every program attends to one run of a row's keys and leaves the maximum of its scores, the sum of
    their exponentials and the weighted sum of its values. The runs divide the keys there are, not the cache's capacity.
    """
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row // H).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0)
    each = tl.cdiv(tl.cdiv(length - first, BLOCK), RUNS) * BLOCK
    begin = first + run * each
    end = tl.minimum(begin + each, length)

    g, d, j = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    inside = (g < GROUP)[:, None] & (d < D)[None, :]
    asked = tl.load(query + (row * GROUP + g)[:, None] * D + d[None, :], mask=inside, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK):
        place = start + j
        cell = (row * L + place)[:, None] * D + d[None, :]
        there = (place < end)[:, None] & (d < D)[None, :]
        key = tl.load(keys + cell, mask=there, other=0.0)
        value = tl.load(values + cell, mask=there, other=0.0)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            scores = CAP * tanh(scores / CAP)
        scores = tl.where((place < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(best - higher)
        total = total * fade + tl.sum(weights, axis=1)
        result = result * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = higher
    at = (row * GROUP + g) * RUNS + run
    count = tl.num_programs(0).to(tl.int64) * GROUP * RUNS
    tl.store(stats + at, best, mask=g < GROUP)
    tl.store(stats + count + at, total, mask=g < GROUP)
    tl.store(sums + at[:, None] * WIDTH + d[None, :], result, mask=(g < GROUP)[:, None])


@triton.jit
def combine_kernel(sums, stats, out, D: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr):
    """Grid (query heads,): out [heads, D] from what :func:`attend_kernel` left."""
    head = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64) * RUNS
    run, d = tl.arange(0, RUNS), tl.arange(0, WIDTH)
    best = tl.load(stats + head * RUNS + run)
    weight = tl.exp(best - tl.max(best, axis=0))
    total = tl.sum(tl.load(stats + count + head * RUNS + run) * weight, axis=0)
    part = tl.load(sums + (head * RUNS + run)[:, None] * WIDTH + d[None, :])
    mean = tl.sum(part * weight[:, None], axis=0) / total
    tl.store(out + head * D + d, mean.to(out.dtype.element_ty), mask=d < D)


def width_for(dim: int) -> int:
    """Channels of a head as the kernels hold them."""
    return max(LEAST_ROWS, triton.next_power_of_2(dim))


def runs_for(rows: int, capacity: int) -> int:
    """Runs that a row's keys are cut into: enough programs for the device, none without a block of keys."""
    return min(
        triton.next_power_of_2(triton.cdiv(PROGRAMS, rows)), 64, triton.next_power_of_2(triton.cdiv(capacity, BLOCK))
    )


@torch.library.custom_op("deltamem::decode_attention", mutates_args=())
def _attend(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    batch, key_heads, capacity, dim = keys.shape
    group, rows = query.shape[1] // key_heads, batch * key_heads
    runs, width = runs_for(rows, capacity), width_for(dim)
    sums = query.new_empty(rows, group, runs, width, dtype=torch.float32)
    stats = query.new_empty(2, rows, group, runs, dtype=torch.float32)
    out = torch.empty_like(query)
    attend_kernel[(rows, runs)](
        query, keys, values, lengths, sums, stats, scale, key_heads, group, capacity, window, softcap, dim,
        max(LEAST_ROWS, triton.next_power_of_2(group)), width, BLOCK, runs, softcap > 0, num_warps=4,
    )  # fmt: skip
    combine_kernel[(rows * group,)](sums, stats, out, dim, width, runs, num_warps=4)
    return out


@_attend.register_fake
def _(query, keys, values, lengths, scale, window, softcap):
    return torch.empty_like(query)


def triton_decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Same function as :func:`deltamem_kernels.attention.naive_decode_attention`."""
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("decode_attention needs contiguous keys and values [B, H, L, D]")
    whole = keys.shape[2] if window is None else window
    return torch.ops.deltamem.decode_attention(query.contiguous(), keys, values, lengths, scale, whole, softcap or 0.0)
