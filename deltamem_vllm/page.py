"""A sequence's page in one layer: its state, its adapter, from which position it writes, how strongly it steers."""

from __future__ import annotations

from torch import Tensor

from deltamem.config import DeltaMemConfig

SETTINGS = 3
NEVER = float(2**31)
"""A position that no token has: the sequence only reads."""


def state_size(config: DeltaMemConfig) -> int:
    """Numbers (float32) of an adapter's states [N, r, r] in one layer; a page begins with them."""
    return config.states * config.rank * config.rank


def page_size(shape: DeltaMemConfig) -> int:
    """Numbers (float32) of a page: states, the adapter's number, the first position that is written, the strength."""
    return state_size(shape) + SETTINGS


def states_in(pages: Tensor, shape: DeltaMemConfig) -> Tensor:
    """[P, page] → the states [P, N, r, r], as a view."""
    return pages[:, :-SETTINGS].unflatten(1, (shape.states, shape.rank, shape.rank))


def adapter_numbers(pages: Tensor) -> Tensor:
    """[P, page] → [P], as a view."""
    return pages[:, -3]


def first_written(pages: Tensor) -> Tensor:
    """[P, page] → [P], as a view."""
    return pages[:, -2]


def strengths(pages: Tensor) -> Tensor:
    """[P, page] → [P], as a view."""
    return pages[:, -1]
