"""One evaluation: what is asked of which model, where the result lies, and the log of answers until it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipelines.config import Config
from pipelines.evaluation.records import RecordLog
from pipelines.run.layout import Layout


class Exam(NamedTuple):
    """A backbone with one of its strategies' adapters on one benchmark.

    ``limit``: on so many questions only. ``by_layer``: with the state of one layer swapped at a time, instead of under
    the configuration's conditions.
    """

    config: Config
    backbone: str
    strategy: str
    seed: int
    benchmark: str
    limit: int | None
    by_layer: bool = False

    @property
    def name(self) -> str:
        """Of the result's files; a limited result and one by layer lie apart from a whole one."""
        limited = "" if self.limit is None else f"-first{self.limit}"
        return f"{self.benchmark}{limited}{'-layers' * self.by_layer}"

    @property
    def result(self) -> Path:
        return Layout(self.config).evaluation(self.backbone, self.strategy, self.seed, self.name)

    @property
    def picture(self) -> Path:
        """Of a result by layer."""
        return self.result.with_suffix(".svg")

    @property
    def records(self) -> Path:
        return Layout(self.config).records(self.backbone, self.strategy, self.seed, self.name)

    def log(self, settings: dict[str, Any], digests: dict[str, str | None], console: Console) -> RecordLog:
        """The log of answers so far, which tells by its key whether they are answers to what is asked now."""
        entry = self.config.entry("benchmarks", self.benchmark)
        key = {
            "benchmark": {"name": self.benchmark, "version": str(entry.version)},
            "settings": settings,
            "digests": digests,
        }
        log = RecordLog(self.result.with_suffix(".records.jsonl"), key)
        if log.records:
            console.print(f"going on after {len(log.records)} answers of an earlier run")
        if log.set_aside:
            console.print(
                "an earlier run answered something else (another model, data or settings): starting over; "
                f"its answers are in {log.set_aside}"
            )
        return log
