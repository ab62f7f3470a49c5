"""Attention as decoding needs it: of one new token per sequence, and of sequences that share their beginning."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_kernels.device import has_triton


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


def prefixed_attention(
    query: Tensor, prefix_keys: Tensor, prefix_values: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """softmax over a beginning that all rows share, and over what each has of its own; inference only.

    The beginning is read once for all rows, where it lies. Scores and sums are float32.

    Args:
        query: [B, G·H, T, D]; G query heads in a row share a key head.
        prefix_keys, prefix_values: [1, H, P, D]; every query attends to all of them.
        keys, values: [B, H, S, D].
        mask: [B, 1, T, S] bool, which of its row's own keys a query attends to.

    Returns:
        [B, G·H, T, D], in the query's dtype.
    """
    heads = keys.shape[1]
    grouped = query.unflatten(1, (heads, -1)).float() * scale
    # all rows' queries of a key head side by side: the beginning is one matrix product for them
    together = grouped.permute(1, 0, 2, 3, 4).reshape(heads, -1, query.shape[-1])
    far, far_log = _attend_all(together, prefix_keys[0], prefix_values[0])
    shape = (heads, query.shape[0], -1, query.shape[2])
    far, far_log = far.view(*shape, query.shape[-1]).transpose(0, 1), far_log.view(shape).transpose(0, 1).unsqueeze(-1)
    scores = grouped @ keys[:, :, None].float().transpose(-1, -2)
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    top = torch.maximum(far_log, scores.amax(-1, keepdim=True))
    far_weight, weights = (far_log - top).exp(), (scores - top).exp()
    out = (far_weight * far + weights @ values[:, :, None].float()) / (far_weight + weights.sum(-1, keepdim=True))
    return out.flatten(1, 2).to(query.dtype)


MOST_SCORES = 2**27
"""Float32 scores held at once in :func:`prefixed_attention`: half a gibibyte."""


def _attend_all(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries [H, Q, D] to all keys [H, P, D], in float32: [H, Q, D], and log Σ exp [H, Q]."""
    block = max(128, MOST_SCORES // (query.shape[0] * query.shape[1]))
    top = query.new_full((*query.shape[:2], 1), float("-inf"))
    total, out = torch.zeros_like(top), torch.zeros_like(query)
    for some_keys, some_values in zip(keys.split(block, 1), values.split(block, 1), strict=True):
        scores = query @ some_keys.float().transpose(-1, -2)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink, weights = (top - higher).exp(), scores.sub_(higher).exp_()
        out = out * shrink + weights @ some_values.float()
        total = total * shrink + weights.sum(-1, keepdim=True)
        top = higher
    return out / total, (top + total.log()).squeeze(-1)
