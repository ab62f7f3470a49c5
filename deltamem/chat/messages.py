"""TODO deltamem/chat/messages.py."""

from __future__ import annotations

from typing import NamedTuple

Message = dict[str, str]


class EncodedMessages(NamedTuple):
    """Token ids, and for each token the segment it belongs to (-1: none)."""

    input_ids: list[int]
    segment_ids: list[int]
