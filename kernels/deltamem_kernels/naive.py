"""The definition of the recurrence: one token after the other, exactly as the paper writes it.

Slow on purpose. Every other backend is tested against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_delta_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read before write, token by token (paper, Method, steps 2 to 5).

    For every token t and every row i of the state S (r×r)::

        r_t = S_{t-1} q_t
        S_t = diag(1 - β_t) S_{t-1} - diag(β_t) (S_{t-1} k_t) k_tᵀ + diag(β_t) v_t k_tᵀ

    Args:
        q, k, v, beta: [B, T, N, r]; q and k already normalised, β in (0, 1).
        state: [B, N, r, r], the state before the first token.
        mask: [B, T] bool; a token where it is False reads zero and writes nothing.

    Returns:
        reads [B, T, N, r] and the state after the last token [B, N, r, r], in the state's dtype.
    """
    dtype = state.dtype
    reads = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, beta_t = (x[:, t].to(dtype) for x in (q, k, v, beta))
        read = torch.einsum("bnij,bnj->bni", state, q_t)
        if mask is not None:
            valid = mask[:, t, None, None].to(dtype)
            read, beta_t = read * valid, beta_t * valid
        predicted = torch.einsum("bnij,bnj->bni", state, k_t)
        write = (beta_t * (v_t - predicted)).unsqueeze(-1) * k_t.unsqueeze(-2)
        state = (1 - beta_t).unsqueeze(-1) * state + write
        reads.append(read)
    return torch.stack(reads, dim=1) if reads else torch.zeros_like(v, dtype=dtype), state
