"""Segments of a pass and their means, for the sequence-state write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Which segment each token belongs to, densely numbered per row.

    index: [B, T] int64; tokens that belong to none carry ``count``.
    count: number of segment slots S (the largest of the batch on a CPU; T on a GPU, where asking for the
        largest would make the host wait for the device).
    """

    index: Tensor
    count: int


def rank_segments(segment_ids: Tensor, valid: Tensor | None) -> Segments:
    """Number the segments of each row 0, 1, … in ascending order of their ids.

    Args:
        segment_ids: [B, T] int; equal numbers make one segment, -1 is not written.
        valid: [B, T] bool or None (all valid).
    """
    tokens = segment_ids.shape[1]
    written = segment_ids >= 0 if valid is None else (segment_ids >= 0) & valid
    last = torch.iinfo(torch.int64).max
    ids, order = segment_ids.long().masked_fill(~written, last).sort(dim=1, stable=True)
    changes = torch.zeros_like(ids)
    changes[:, 1:] = (ids[:, 1:] != ids[:, :-1]).long()
    rank = torch.empty_like(ids).scatter_(1, order, changes.cumsum(1))
    count = tokens
    if segment_ids.device.type == "cpu":
        count = int(rank.masked_fill(~written, -1).max()) + 1 if tokens else 0
    return Segments(rank.masked_fill(~written, count), count)


def segment_means(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean of x over the tokens of each segment, by one scatter (no loop over segments).

    Args:
        x: [B, T, C].

    Returns:
        means [B, S, C] in float32 (or wider), and [B, S] bool: which slots hold a segment.
    """
    batch, _, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    index = segments.index
    counts = torch.zeros(batch, segments.count + 1, dtype=dtype, device=x.device)
    counts = counts.scatter_add(1, index, torch.ones_like(index, dtype=dtype))
    sums = torch.zeros(batch, segments.count + 1, channels, dtype=dtype, device=x.device)
    sums = sums.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, channels), x.to(dtype))
    counts, sums = counts[:, : segments.count], sums[:, : segments.count]
    return sums / counts.clamp_min(1).unsqueeze(-1), counts > 0
