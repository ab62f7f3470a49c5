"""How far a long job is and how long it will still take: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Meter:
    """Counts units of work; a context manager.

    Args:
        total: units in all.
        every: seconds between two lines where the output is no terminal.
    """

    def __init__(self, total: int, console: Console, every: float = 15.0):
        self.total, self.console, self.every = total, console, every
        self.title, self.done = "", 0
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print()

    def step(self, title: str) -> None:
        """Say what is being done from now on."""
        self.title = title
        if self._bar is not None:
            self._bar.update(self._task, description=title)

    def advance(self, units: int) -> None:
        self.done += units
        if self.done and self._first is None:
            self._first = time.monotonic(), self.done
        if self._bar is not None:
            self._bar.advance(self._task, units)
        elif time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self._print()

    def _print(self) -> None:
        self.console.print(self._line(), soft_wrap=True)  # a line of a log is one line

    def _line(self) -> str:
        now = time.monotonic()
        line = f"{self.title}: {self.done} of {self.total}, {_clock(now - self._start)} so far"
        began, before = self._first or (now, self.done)
        if before < self.done < self.total:  # starting, and what an earlier run did, tells nothing of the pace
            line += f", about {_clock((now - began) / (self.done - before) * (self.total - self.done))} to go"
        return line


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
