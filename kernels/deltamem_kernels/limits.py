"""States that stay within a norm: the recurrence in parts, between which they are brought back.

No part of the paper's Method. What a state gathers over many thousands of tokens is more than training ever showed, and
what is read from it then ruins the model; docs/remember.md has the measurements.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from deltamem_kernels.scan import gated_delta_scan

LIMIT_EVERY = 256
"""Tokens between which states are brought back: few enough that no state gets far, many enough that it costs little."""


def limited(state: Tensor, limit: Tensor | None) -> Tensor:
    """States [B, N, r, r], each scaled down to its limit where its Frobenius norm is beyond it.

    Args:
        limit: [N] or [B, N] float32, above zero; None: there is none.
    """
    if limit is None:
        return state
    norms = state.flatten(-2).norm(dim=-1)
    return state * (limit / torch.maximum(norms, limit))[..., None, None]


def limited_scan(
    projected: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None, limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`gated_delta_scan` of states that are :func:`limited` before the first token and before every 256th.

    Arguments and result as of these.
    """
    if limit is None:
        return gated_delta_scan(projected, beta_bias, state, mask)
    reads = []
    masks = repeat(None) if mask is None else mask.split(LIMIT_EVERY, 1)
    for part, of_part in zip(projected.split(LIMIT_EVERY, 1), masks, strict=False):
        read, state = gated_delta_scan(part, beta_bias, limited(state, limit), of_part)
        reads.append(read)
    return torch.cat(reads, 1), state
