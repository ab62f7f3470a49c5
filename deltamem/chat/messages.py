"""A chat's messages, and what becomes of them for a model."""

from __future__ import annotations

from typing import NamedTuple

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class EncodedMessages(NamedTuple):
    """Messages as a model takes them: lists of one length T, for one sequence.

    Attributes:
        input_ids: token ids.
        segment_ids: of each token the segment it belongs to, from 0; -1: none, so that ssw doesn't write it.
    """

    input_ids: list[int]
    segment_ids: list[int]
