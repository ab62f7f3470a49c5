"""The recurrence in plain PyTorch, a chunk of tokens at a time: fast on a CPU, differentiable, deterministic.

Write u_t = β_t (v_t - S_{t-1} k_t) for the (row-wise) correction that token t writes, so that row i obeys
s_t = λ_t s_{t-1} + u_t k_tᵀ with λ_t = 1 - β_t. Inside a chunk that starts from s_0 the corrections solve a
unit lower-triangular system

    u_t + β_t Σ_{j<t} D[t, j+1] (k_j·k_t) u_j = β_t v_t - β_t D[t, 0] (s_0·k_t),      D[t, a] = Π_{a≤m<t} λ_m,

so all chunks are solved at once for their dependence on s_0, the chunk boundaries follow from one short serial
pass of r×r products, and every read is one masked matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The triangular solve costs T·L·r per state and the serial pass T/L steps; 32 balances them on CPU cores from
# T = 128 to 8,192 (benchmarks/RESULTS.md).
CHUNK = 32
# Keeps log λ finite at β = 1. Added, not clamped, so that the gradient at λ = 0 stays the true one.
TINY = 1e-30


def chunk_delta_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, mask: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Same function as :func:`naive_delta_scan`, computed chunk by chunk in the state's dtype."""
    tokens, dtype = q.shape[1], state.dtype
    if tokens == 0:
        return torch.zeros_like(v, dtype=dtype), state
    length = min(chunk, tokens)
    if mask is not None:
        beta = beta * mask[:, :, None, None].to(beta.dtype)
    q, k, v, beta = (_to_chunks(x.to(dtype), length) for x in (q, k, v, beta))  # [B, N, C, L, r]

    beta_rows = beta.transpose(-1, -2)  # [B, N, C, r, L]
    decay = _boundary_decay(torch.log(1 - beta_rows + TINY))  # [B, N, C, r, L+1, L+1]
    from_start, between = decay[..., :-1, 0], decay[..., :-1, 1:]
    to_end, across = decay[..., -1, 1:], decay[..., -1, 0]
    strictly_lower = torch.ones(length, length, dtype=torch.bool, device=q.device).tril(-1)
    between = between.masked_fill(~strictly_lower, 0.0)  # [t, j]: from after token j to before token t

    keys = (k @ k.transpose(-1, -2)).unsqueeze(3)  # [B, N, C, 1, L, L]
    system = beta_rows.unsqueeze(-1) * between * keys
    from_value = (beta_rows * v.transpose(-1, -2)).unsqueeze(-1)
    from_state = -(beta_rows * from_start).unsqueeze(-1) * k.unsqueeze(3)
    # unitriangular: the ones on the diagonal are implied
    solved = torch.linalg.solve_triangular(
        system, torch.cat([from_value, from_state], dim=-1), upper=False, unitriangular=True
    )
    u_value, u_state = solved[..., 0], solved[..., 1:]  # [B, N, C, r, L], [B, N, C, r, L, r]

    weighted = (to_end.unsqueeze(-1) * u_state).transpose(-1, -2) @ k.unsqueeze(3)  # [B, N, C, r, r, r]
    transition = weighted + across[..., None, None] * torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    offset = (to_end * u_value) @ k  # [B, N, C, r, r]
    starts = []
    for c in range(q.shape[2]):
        starts.append(state)
        state = (state.unsqueeze(-2) @ transition[:, :, c]).squeeze(-2) + offset[:, :, c]
    start = torch.stack(starts, dim=2)  # [B, N, C, r, r]

    u = u_value + (u_state @ start.unsqueeze(-1)).squeeze(-1)
    inside = (between * (q @ k.transpose(-1, -2)).unsqueeze(3)) @ u.unsqueeze(-1)
    reads = inside.squeeze(-1) + from_start * (start @ q.transpose(-1, -2))  # [B, N, C, r, L]
    reads = reads.permute(0, 2, 4, 1, 3).flatten(1, 2)[:, :tokens]
    if mask is not None:
        reads = reads * mask[:, :, None, None].to(dtype)
    return reads, state


def _to_chunks(x: Tensor, length: int) -> Tensor:
    """[B, T, N, r] → [B, N, C, L, r]; the last chunk is filled with zeros, which as β write nothing."""
    missing = -x.shape[1] % length
    x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, length)).permute(0, 3, 1, 2, 4)


def _boundary_decay(log_decay: Tensor) -> Tensor:
    """[..., L] logs of λ → [..., L+1, L+1] with D[t, a] = Π_{a≤m<t} λ_m for a ≤ t, and 1 above the diagonal.

    Each product is its own sum of logs (never a difference of two long sums), so it stays exact where λ → 0.
    """
    length = log_decay.shape[-1]
    starts_before = torch.ones(length, length + 1, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay.unsqueeze(-1) * starts_before  # [m, a] = log λ_m where a ≤ m
    return F.pad(terms.cumsum(-2), (0, 0, 1, 0)).exp()
