"""A sequence's page in one layer: its state, from which position it writes, and how strongly it steers."""

from __future__ import annotations

from torch import Tensor

from deltamem.config import DeltaMemConfig

SETTINGS = 2
NEVER = float(2**31)
"""A position that no token has: the sequence only reads."""


def page_size(config: DeltaMemConfig) -> int:
    """Numbers (float32) of a page: the state [N, r, r], the first position that is written, the strength."""
    return config.states * config.rank * config.rank + SETTINGS


def states_in(pages: Tensor, config: DeltaMemConfig) -> Tensor:
    """[P, page] → the states [P, N, r, r], as a view."""
    return pages[:, :-SETTINGS].unflatten(1, (config.states, config.rank, config.rank))


def first_written(pages: Tensor) -> Tensor:
    """[P, page] → [P], as a view."""
    return pages[:, -2]


def strengths(pages: Tensor) -> Tensor:
    """[P, page] → [P], as a view."""
    return pages[:, -1]
