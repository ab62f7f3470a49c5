"""The training curve: one row of a CSV file per optimiser step, written while it runs and read by whoever follows."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.run.progress import Meter
from pipelines.training.trackers import Tracker

STEP, LOSS = "step", "loss"
COLUMNS = (
    STEP,
    LOSS,
    "answer_nll",
    "contrast",
    "repeat_nll",
    "memory_effect",
    "write_gate",
    "state_norm",
    "gradient_norm",
    "learning_rate",
    "tokens_per_second",
    "seconds",
)


SOURCE_NLL = "answer_nll/"
"""How the column of a source's answer NLL begins; its name follows."""


class Curve:
    """The file, as one worker writes it. A column that the kind of adapter doesn't have stays empty.

    Args:
        start: steps that are done; rows after them are of a run that was cut short, and go.
        sources: those of a mixture have a column each, empty at steps without a question of theirs.
        more: columns besides, empty at steps that don't fill them.
    """

    def __init__(self, path: Path, start: int, sources: Sequence[str] = (), more: Sequence[str] = ()):
        self.path = path
        self.columns = (*COLUMNS, *(SOURCE_NLL + name for name in sources), *more)
        kept = [row for row in read(path) if int(row[STEP]) <= start] if start else []
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far; none where there is no file yet."""
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def _values(row: Mapping[str, str]) -> dict[str, float]:
    """What a row holds, without the columns that are empty in it."""
    return {name: float(value) for name, value in row.items() if value != ""}


class Watcher:
    """Shows how far a training is, by its growing curve, and sends its rows on; a context manager.

    Args:
        trackers: get every row once; after a worker's death those that are made again a second time.
    """

    def __init__(self, path: Path, title: str, steps: int, trackers: Sequence[Tracker] = ()):
        self.path, self.title, self.trackers = path, title, list(trackers)
        self._sent = 0
        self.meter = Meter(steps, Console(stderr=True))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self.meter.step(self.title)
        self.meter.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._show()
        self._tell(lambda tracker: tracker.close(finished=error[0] is None))
        self.meter.__exit__(*error)

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self._show()

    def _show(self) -> None:
        try:
            rows = [_values(row) for row in read(self.path)]
            step, loss = int(rows[-1][STEP]), f"{rows[-1][LOSS]:.3f}"
        except (OSError, IndexError, ValueError, TypeError, KeyError):
            return  # not there yet, or read while a row was being written
        self.meter.step(f"{self.title}, loss {loss}")
        self.meter.advance(step - self.meter.done)
        for row in rows[min(self._sent, len(rows)) :]:
            values = {name: value for name, value in row.items() if name != STEP}
            self._tell(lambda tracker, at=int(row[STEP]), values=values: tracker.log(at, values))
        self._sent = len(rows)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                what(tracker)
            except Exception as error:  # whatever a tracker runs into, the training goes on without it
                self.meter.console.print(f"{type(tracker).__name__} gets no more of this curve: {error}", markup=False)
                self.trackers.remove(tracker)
