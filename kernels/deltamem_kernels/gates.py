"""From one projection of the attention's input to the recurrence's q, k, v and β (paper, Method, steps 1 and 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_projections(
    projected: Tensor, beta_bias: Tensor, num_states: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise and gate: q = l2norm(tanh(q̃)), k = l2norm(tanh(k̃)), v = ṽ, β = sigmoid(β̃ + b).

    Args:
        projected: [..., 4·N·r], the blocks q̃ | k̃ | ṽ | β̃, each N consecutive blocks of r channels.
        beta_bias: [N·r].

    Returns:
        q, k, v, β, each [..., N, r], float32 (float64 for float64 input).
    """
    dtype = torch.promote_types(projected.dtype, torch.float32)
    q, k, v, gate = projected.to(dtype).unflatten(-1, (4, num_states, rank)).unbind(-3)
    beta = torch.sigmoid(gate + beta_bias.to(dtype).unflatten(-1, (num_states, rank)))
    return F.normalize(torch.tanh(q), dim=-1), F.normalize(torch.tanh(k), dim=-1), v, beta


def gated_read(projected: Tensor, state: Tensor) -> Tensor:
    """Reads r_t = S q_t of every token from one unchanging state, q as in :func:`gate_projections`.

    Args:
        projected: [B, T, 4·N·r].
        state: [B, N, r, r].

    Returns:
        [B, T, N, r], in the state's dtype.
    """
    states, rank = state.shape[1], state.shape[-1]
    q = projected[..., : states * rank].to(state.dtype).unflatten(-1, (states, rank))
    return (F.normalize(torch.tanh(q), dim=-1).transpose(1, 2) @ state.transpose(-1, -2)).transpose(1, 2)
