"""The baseline: one program per row of a state walks all T tokens, as the public release's kernel is described.

Written from that description alone. Forward: a program owns one row i, carries its r numbers in registers, reads
before it writes and stores the row of every step for the backward. Backward: the same programs walk back; rows
share q and k, so those gradients are added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(q, k, v, beta, state, reads, new_state, history, T, N, R: tl.constexpr, KEEP: tl.constexpr):
    i = tl.program_id(0)
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    j = tl.arange(0, R)
    row = ((b * N + n) * R + i) * R + j
    s = tl.load(state + row)
    for t in range(0, T):
        at = ((b * T + t) * N + n) * R
        if KEEP:
            tl.store(history + (at + i) * R + j, s)
        key = tl.load(k + at + j).to(tl.float32)
        gate = tl.load(beta + at + i).to(tl.float32)
        tl.store(reads + at + i, tl.sum(s * tl.load(q + at + j).to(tl.float32), axis=0))
        write = gate * (tl.load(v + at + i).to(tl.float32) - tl.sum(s * key, axis=0))
        s = (1.0 - gate) * s + write * key
    tl.store(new_state + row, s)


@triton.jit
def _backward(q, k, v, beta, history, d_reads, d_new_state, dq, dk, dv, dbeta, d_state, T, N, R: tl.constexpr):
    i = tl.program_id(0)
    n = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    j = tl.arange(0, R)
    row = ((b * N + n) * R + i) * R + j
    g = tl.load(d_new_state + row)
    for back in range(0, T):
        at = ((b * T + T - 1 - back) * N + n) * R
        query, key = tl.load(q + at + j).to(tl.float32), tl.load(k + at + j).to(tl.float32)
        gate, value = tl.load(beta + at + i).to(tl.float32), tl.load(v + at + i).to(tl.float32)
        s, d_read = tl.load(history + (at + i) * R + j), tl.load(d_reads + at + i)
        seen = tl.sum(g * key, axis=0)
        error = value - tl.sum(s * key, axis=0)
        tl.store(dv + at + i, gate * seen)
        tl.store(dbeta + at + i, error * seen - tl.sum(g * s, axis=0))
        tl.atomic_add(dk + at + j, gate * (error * g - seen * s))
        tl.atomic_add(dq + at + j, d_read * s)
        g = (1.0 - gate) * g - gate * seen * key + d_read * query
    tl.store(d_state + row, g)


class _SerialScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, state):
        q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
        batch, tokens, states, rank = q.shape
        keep = any(ctx.needs_input_grad)
        reads, new_state = state.new_empty(q.shape), torch.empty_like(state)
        history = state.new_empty((*q.shape, rank) if keep else 0)
        _forward[(rank, states, batch)](
            q, k, v, beta, state, reads, new_state, history, tokens, states, rank, keep, num_warps=1
        )
        ctx.save_for_backward(q, k, v, beta, history)
        return reads, new_state

    @staticmethod
    def backward(ctx, d_reads, d_new_state):
        q, k, v, beta, history = ctx.saved_tensors
        batch, tokens, states, rank = q.shape
        dq, dk = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k))
        dv, dbeta = (torch.empty_like(x, dtype=torch.float32) for x in (v, beta))
        d_state = torch.empty_like(d_new_state)
        _backward[(rank, states, batch)](
            q, k, v, beta, history, d_reads.contiguous(), d_new_state.contiguous(), dq, dk, dv, dbeta, d_state,
            tokens, states, rank, num_warps=1,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype), d_state


def serial_scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Same function as deltamem_kernels.delta_scan without a mask: q, k, v, beta [B, T, N, r], state [B, N, r, r]."""
    return _SerialScan.apply(q, k, v, beta, state)
