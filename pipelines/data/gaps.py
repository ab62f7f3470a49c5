"""Gaps to fill: questions that a text itself gives, by a name, a number or a long word left out of it."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from pipelines.data.documents import Document, Exercise, Reading
from pipelines.data.draw import pick, shuffled

PROMPT = "Fill in the blank: {}"
BLANK = "___"
LONG_WORD = 7
"""Characters of a word that is left out without being a name or a number."""
WORDS_BEFORE, WORDS_AFTER = (3, 8), (0, 6)
"""How many words around a gap are shown: from so many to fewer than so many."""

_CORE = re.compile(r"\w[\w'’.,:%-]*\w|\w")


def asked_for_gaps(reading: Reading, count: int) -> Reading:
    """The same with up to ``count`` more exercises of each document, without those that have none even so.

    They are drawn by the document's id: the same on every machine.
    """
    if not count:
        return reading
    documents = (_with_gaps(document, count) for document in reading.documents)
    return replace(reading, documents=(document for document in documents if document.exercises))


def _with_gaps(document: Document, count: int) -> Document:
    draw = random.Random(f"{document.document_id}/gaps")
    found = [gap for message in document.messages for gap in _gaps(message["content"], draw)]
    more = [_exercise(f"{document.document_id}/gap{number}", *gap)
            for number, gap in enumerate(shuffled(draw, found)[:count])]  # fmt: skip
    return replace(document, exercises=[*document.exercises, *more])


def _exercise(question_id: str, shown: str, word: str) -> Exercise:
    return Exercise(question_id, [{"role": "user", "content": PROMPT.format(shown)}], [word], "gap")


def _gaps(text: str, draw: random.Random) -> list[tuple[str, str]]:
    """(the words around a gap, the one left out) for every word that may be."""
    words, found = list(re.finditer(r"\S+", text)), []
    for place, word in enumerate(words):
        core = _CORE.search(word.group())
        if core is None or not _tells(core.group(), follows=words[place - 1].group() if place else ""):
            continue
        first = words[max(0, place - pick(draw, range(*WORDS_BEFORE)))]
        last = words[min(len(words) - 1, place + pick(draw, range(*WORDS_AFTER)))]
        start, end = word.start() + core.start(), word.start() + core.end()
        found.append((text[first.start() : start] + BLANK + text[end : last.end()], core.group()))
    return found


def _tells(word: str, follows: str) -> bool:
    """Whether a word says something of its own: a number, a name inside a sentence, or a long word."""
    inside = bool(follows) and not follows.rstrip("\"'”’)]").endswith((".", "!", "?"))
    return any(c.isdigit() for c in word) or (inside and word[0].isupper()) or len(word) >= LONG_WORD
