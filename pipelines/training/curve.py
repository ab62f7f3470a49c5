"""The training curve: one row of a CSV file per optimiser step, written while it runs and read by whoever follows."""

from __future__ import annotations

import csv
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.run.progress import Meter

STEP, LOSS = "step", "loss"
COLUMNS = (
    STEP,
    LOSS,
    "answer_nll",
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
    """

    def __init__(self, path: Path, start: int, sources: Sequence[str] = ()):
        self.path = path
        self.columns = (*COLUMNS, *(SOURCE_NLL + name for name in sources))
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


class Watcher:
    """Shows how far a training is, by its growing curve; a context manager."""

    def __init__(self, path: Path, title: str, steps: int):
        self.path, self.title = path, title
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
        self.meter.__exit__(*error)

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self._show()

    def _show(self) -> None:
        try:
            row = read(self.path)[-1]
            step, loss = int(row[STEP]), f"{float(row[LOSS]):.3f}"
        except (OSError, IndexError, ValueError, TypeError, KeyError):
            return  # not there yet, or read while a row was being written
        self.meter.step(f"{self.title}, loss {loss}")
        self.meter.advance(step - self.meter.done)
