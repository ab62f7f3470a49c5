"""A chat's messages, and what becomes of them for a model."""

from __future__ import annotations

from typing import NamedTuple

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""


class EncodedMessages(NamedTuple):
    """Token ids, and for each token the segment it belongs to (-1: none)."""

    input_ids: list[int]
    segment_ids: list[int]
