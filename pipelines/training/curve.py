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
    "kl",
    "text_nll",
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
        trackers: get every row once; after a worker's death those that are made again a second time. One that fails,
            as when its server is away for a while, is tried again with each look at the curve, and given up at the end.
        later: makes more of them once the training has begun, which waits neither for a store nor for its library.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        steps: int,
        trackers: Sequence[Tracker] = (),
        later: Callable[[], Sequence[Tracker]] = tuple,
    ):
        self.path, self.title = path, title
        self._sent, self._later = dict.fromkeys(trackers, 0), later
        self._failed: dict[Tracker, Exception] = {}
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
        for tracker in self._sent:
            if tracker not in self._failed:
                self._tell(tracker, lambda to: to.close(finished=error[0] is None))
            if failure := self._failed.get(tracker):
                self._say(f"{type(tracker).__name__} gets no more of this curve: {failure}")
        self.meter.__exit__(*error)

    def _watch(self) -> None:
        self._sent |= dict.fromkeys(self._later(), 0)
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
        for tracker in self._sent:
            self._send(tracker, rows)

    def _send(self, tracker: Tracker, rows: Sequence[Mapping[str, float]]) -> None:
        """What a tracker hasn't got yet, as far as it takes it."""
        self._sent[tracker] = min(self._sent[tracker], len(rows))
        for row in rows[self._sent[tracker] :]:
            values = {name: value for name, value in row.items() if name != STEP}
            if not self._tell(tracker, lambda to, at=int(row[STEP]), values=values: to.log(at, values)):
                return
            self._sent[tracker] += 1

    def _tell(self, tracker: Tracker, what: Callable[[Tracker], None]) -> bool:
        """Whether it took it; whatever a tracker runs into, the training goes on."""
        try:
            what(tracker)
        except Exception as error:
            if tracker not in self._failed:
                self._say(f"{type(tracker).__name__} doesn't take this curve, and is tried again: {error}")
            self._failed[tracker] = error
            return False
        self._failed.pop(tracker, None)
        return True

    def _say(self, sentence: str) -> None:
        self.meter.console.print(sentence, markup=False)
