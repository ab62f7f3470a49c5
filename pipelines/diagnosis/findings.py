"""What was looked at, and how it is."""

from __future__ import annotations

from typing import Literal, NamedTuple

State = Literal["ok", "note", "missing"]
"""``note``: the run can start, and it is worth knowing; ``missing``: a job will fail, or wait for ever."""


class Finding(NamedTuple):
    """One thing that a run needs.

    Attributes:
        what: as the configuration names it.
        told: how it is; where it is missing, with what to do.
    """

    what: str
    state: State
    told: str
