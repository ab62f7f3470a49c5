"""Values that look like a given one and stand in no list.

A model that is trained on a small set of values learns them by heart and completes them, instead of copying what it
was told (docs/remember.md, runs 6 and 7).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipelines.data.draw import pick

_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr gr kr pl sh st th tr".split()
_VOWELS = "a e i o u ai ea io ou".split()
_CLOSES = ["", "n", "r", "s", "l", "x", "m", "ck"]
_MONTHS = "January February March April May June July August September October November December".split()
_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_LEADING = {"a", "an", "the", "in", "on", "under", "behind", "at"}
"""Words that a value keeps: a dentist becomes a plumber, and not plumber."""


class Words(NamedTuple):
    """Real words to draw from besides made-up ones; either may be empty."""

    names: Sequence[str] = ()
    others: Sequence[str] = ()

    @classmethod
    def of(cls, answers: Iterable[str]) -> Words:
        """Those among short answers: names of one or two capitalised words, and other words without their article."""
        short = sorted({a for a in answers if len(a) > 2 and len(a.split()) <= 3 and _is_plain(a)})
        names = [a for a in short if len(a.split()) <= 2 and all(word[0].isupper() for word in a.split())]
        return cls(names, [_ARTICLE.sub("", a) for a in short if a[0].islower()])


MADE_UP = Words()
"""No real ones."""


def look_alike(rng: random.Random, value: str, words: Words) -> str:
    """Another value of the same form: digits for digits, a name for a name, a word for a word."""
    if any(c.isdigit() for c in value):
        return _other_digits(rng, value)
    parts = value.split()
    if value[0].isupper() or parts[-1][0].isupper():
        if words.names and rng.random() < 0.25:
            return pick(rng, words.names)
        return " ".join(_name(rng, words) for _ in parts)
    kept = parts[:-1] if parts[0] in _LEADING else []
    return " ".join([*kept, pick(rng, words.others) if words.others and rng.random() < 0.7 else _made_up(rng)])


def _name(rng: random.Random, words: Words) -> str:
    if words.names and rng.random() < 0.55:
        return pick(rng, words.names).split()[0]
    return _made_up(rng).capitalize()


def _made_up(rng: random.Random) -> str:
    syllables = pick(rng, (1, 2, 2, 3))
    return "".join(pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(syllables)) + pick(rng, _CLOSES)


def _other_digits(rng: random.Random, value: str) -> str:
    """No number begins with 0; months and the capitals of a flight are others too."""
    drawn = "".join(
        c if not c.isdigit() else pick(rng, "0123456789" if value[place - 1 : place].isdigit() else "123456789")
        for place, c in enumerate(value)
    )
    first, *rest = drawn.split(" ")
    if first in _MONTHS:
        first = pick(rng, _MONTHS)
    elif first.isupper() and first.isalpha():
        first = "".join(pick(rng, string.ascii_uppercase) for _ in first)
    return " ".join([first, *rest])


def _is_plain(text: str) -> bool:
    return text.isascii() and all(c.isalpha() or c in " '-" for c in text) and text[0].isalpha() and text[-1].isalpha()
