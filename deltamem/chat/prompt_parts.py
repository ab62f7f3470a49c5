"""Long prompts, cut into parts that are fed one pass after the other.

A pass over a whole long prompt needs memory for all its tokens' activations at once, and while it runs no other
reply of a server goes on. Parts bound both. They make what one pass makes:

- tsw and msw write token by token, so where a pass ends changes nothing.
- Tokens that are only read (``write=False``) leave the memory as it is, under every strategy.
- ssw, writing, is not cut: the reads of a pass see the memory as it was before the pass, and a segment is
  written as the mean over all of its tokens. Its definition is one pass over the new messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Large enough that a GPU is busy with the tokens rather than with reading the weights (a few hundred tokens
# suffice for that), small enough that a running reply waits for tens of milliseconds only.
PART_TOKENS = 512


class Part(NamedTuple):
    """Tokens of one pass.

    Attributes:
        segments: the segment of each token, where the strategy writes by segment.
    """

    ids: list[int]
    segments: list[int] | None
    write: bool


def cut(
    ids: Sequence[int], segments: Sequence[int] | None, write: bool, by_segment: bool, most_tokens: int
) -> list[Part]:
    """Parts of at most ``most_tokens`` tokens, in order; the whole as one part where it may not be cut."""
    ids = list(ids)
    if write and by_segment:
        return [Part(ids, None if segments is None else list(segments), True)]
    starts = range(0, len(ids), most_tokens)
    return [Part(ids[start : start + most_tokens], None, write) for start in starts]
