"""Attention of one new token per sequence, which is what decoding runs in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_kernels.step import has_triton


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · query · keysᵀ) · values over the first ``lengths`` keys of each row; inference only.

    On a GPU two kernels, which read a group's keys and values once and none beyond a row's length, and which hand
    nothing to the host, so that a CUDA graph can replay them.

    Args:
        query: [B, G·H, D]; G query heads in a row share a key head.
        keys, values: [B, H, L, D].
        lengths: [B] int64, at least 1.
        window: only the last ``window`` of those keys count; None: all.
        softcap: c in c · tanh(score / c), which bounds the scores; None: they aren't bounded.

    Returns:
        [B, G·H, D], in the query's dtype.
    """
    if has_triton(query):
        from deltamem_kernels.triton_attention import triton_decode_attention

        return triton_decode_attention(query, keys, values, lengths, scale, window, softcap)
    return naive_decode_attention(query, keys, values, lengths, scale, window, softcap)


def naive_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition of :func:`decode_attention`, in PyTorch."""
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = (grouped @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    place = torch.arange(keys.shape[2], device=keys.device)
    counts = place < lengths[:, None]
    if window is not None:
        counts &= place >= lengths[:, None] - window
    scores = scores.masked_fill(~counts[:, None, None], float("-inf"))
    return (scores.softmax(-1).to(values.dtype) @ values).flatten(1, 2)
