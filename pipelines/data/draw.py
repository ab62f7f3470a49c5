"""Draws that give the same in every Python version.

Of the random module's methods only random() is promised to.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, all alike likely."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    """The items in a random order."""
    return sorted(items, key=lambda _: rng.random())
