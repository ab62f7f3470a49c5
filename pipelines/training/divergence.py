"""A training that has come apart ends, and says so, instead of going on to an adapter that is worth nothing.

Its numbers are finite still, so :mod:`pipelines.training.finite` has nothing against them: a rate at the edge makes the
gradient of a step in a thousand, then of every other one, a million times as large, and clipping makes each of these a
full step into anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.finite import likely_cause

WINDOW = 100
"""Steps whose median is looked at: sources take turns, and single steps may be anything."""

LIMITS = {"loss": 1.5, "gradient norm": 10.0}
"""How many times that of the first steps each median may be, before all of them are beyond.

Five trainings of `docs/remember.md` stayed below 1.11 and 1.06; one that diverged came to 13 and to 10¹⁴.
"""


class Divergence:
    """Watches the loss and the gradient norm of one training.

    Args:
        train, steps: for the message.
        began: what :attr:`began` was when the training stopped, if it goes on.
    """

    def __init__(self, train: Train, steps: int, began: Mapping[str, float] | None = None):
        self._train, self._steps = train, steps
        self._last = deque[Mapping[str, float]](maxlen=WINDOW)
        self.began = dict(began) if began else None
        """Medians of the first steps, once there are enough of them."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, counted from 1.

        Raises:
            StageError: the training has diverged.
        """
        self._last.append(numbers)
        if len(self._last) < WINDOW:
            return
        now = {name: median(past[name] for past in self._last) for name in LIMITS}
        self.began = self.began or now
        if all(now[name] > limit * self.began[name] for name, limit in LIMITS.items()):
            changes = ", ".join(f"the {name} from {self.began[name]:.3g} to {now[name]:.3g}" for name in LIMITS)
            raise StageError(
                f"the training diverged: from its first {WINDOW} steps to the {WINDOW} up to step {step} of "
                f"{self._steps}, the medians rose, {changes}. {likely_cause(step, self._steps, self._train)}"
            )
