"""Cutting a long text into messages."""

from __future__ import annotations

import re

# Where a text may be cut: after a paragraph, a line or a sentence, in the order of preference.
_ENDS = [
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+"),
    re.compile(r"\s+"),
]


def cut_text(text: str, longest: int) -> list[str]:
    """Pieces of at most ``longest`` characters, each as long as the next end of a paragraph allows.

    Where a paragraph is longer it is cut after a line, then after a sentence, a word, or anywhere. White
    space at the ends of pieces is dropped; a text of white space has no pieces.
    """
    pieces = []
    rest = text.strip()
    while len(rest) > longest:
        cut = next((found for end in _ENDS if (found := _last_end(end, rest, longest))), longest)
        pieces.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*pieces, rest] if rest else pieces


def _last_end(end: re.Pattern[str], text: str, longest: int) -> int | None:
    last = None
    for match in end.finditer(text, 0, longest + 1):
        if 0 < match.start() <= longest:
            last = match.start()
    return last
