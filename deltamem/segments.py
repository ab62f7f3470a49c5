"""Segments of a pass and their means, for the sequence-state write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Which segment each token belongs to, densely numbered per row.

    index: [B, T] int64; tokens that belong to none carry ``count``.
    count: number of segment slots S: the largest of the batch where the ids came on the CPU, else T, because asking
        for the largest would make the host wait for the device.
    """

    index: Tensor
    count: int


def rank_segments(segment_ids: Tensor, valid: Tensor | None, device: torch.device | None = None) -> Segments:
    """Number the segments of each row 0, 1, … in ascending order of their ids.

    Args:
        segment_ids: [B, T] int; equal numbers make one segment, -1 is not written.
        valid: [B, T] bool or None (all valid), on ``device``.
        device: where the pass runs; None means where the ids are.
    """
    written = segment_ids >= 0
    last = torch.iinfo(torch.int64).max
    ids, order = segment_ids.long().masked_fill(~written, last).sort(dim=1, stable=True)
    changes = torch.zeros_like(ids)
    changes[:, 1:] = (ids[:, 1:] != ids[:, :-1]).long()
    rank = torch.empty_like(ids).scatter_(1, order, changes.cumsum(1))
    count = segment_ids.shape[1]
    if segment_ids.device.type == "cpu" and count:
        count = int(rank.masked_fill(~written, -1).max()) + 1
    rank = rank.masked_fill(~written, count).to(device or segment_ids.device, non_blocking=True)
    return Segments(rank if valid is None else rank.masked_fill(~valid, count), count)


def segment_means(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean of x over the tokens of each segment (no loop over segments).

    Few segments are one product with their indicator matrix, which gives the same bits every time; where their number
    isn't known, one scatter adds every token to its slot.

    Args:
        x: [B, T, C].

    Returns:
        means [B, S, C] in float32 (or wider), and [B, S] bool: which slots hold a segment.
    """
    batch, tokens, channels = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    index, count = segments
    if count < tokens:
        member = (index.unsqueeze(1) == torch.arange(count, device=index.device)[:, None]).to(x.dtype)
        counts, sums = member.sum(-1), member @ x
    else:
        counts = x.new_zeros(batch, count + 1).scatter_add(1, index, torch.ones_like(index, dtype=x.dtype))[:, :count]
        sums = x.new_zeros(batch, count + 1, channels)
        sums = sums.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, channels), x)[:, :count]
    return sums / counts.clamp_min(1).unsqueeze(-1), counts > 0
