"""One evaluation: what is asked of which model, where the result lies, and the log of answers until it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipelines.config import Config
from pipelines.evaluation.records import RecordLog
from pipelines.run.layout import Layout


class Exam(NamedTuple):
    """A backbone with one of its strategies' adapters on one benchmark; ``limit``: on so many questions only."""

    config: Config
    backbone: str
    strategy: str
    seed: int
    benchmark: str
    limit: int | None

    @property
    def name(self) -> str:
        """Of the result's files; a limited result lies apart from a whole one."""
        return self.benchmark if self.limit is None else f"{self.benchmark}-first{self.limit}"

    @property
    def result(self) -> Path:
        return Layout(self.config).evaluation(self.backbone, self.strategy, self.seed, self.name)

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
