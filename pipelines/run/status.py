"""What of a run is finished, what failed and what waits, judged by the files and logs that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.config import Config
from pipelines.run import parts
from pipelines.run.layout import Layout


@dataclass(frozen=True)
class Job:
    """One job of the workflow: ``state`` is failed when it ran but left no output (or was interrupted)."""

    stage: str
    cell: tuple[str, ...]
    log: Path
    state: Literal["done", "failed", "waiting"]

    def __str__(self) -> str:
        return " ".join((self.stage, *self.cell))

    def reason(self) -> str:
        """The last telling line of the job's log: an error, else what is no progress bar."""
        try:
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return "no log"
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or [line for line in lines if "%|" not in line] or ["nothing in its log"])[-1]


def jobs(config: Config) -> list[Job]:
    """Every job from backbone to register, in the order of the workflow."""
    layout = Layout(config)
    found: dict[tuple[str, ...], Job] = {}

    def add(stage: str, cell: tuple[str, ...], outputs: list[Path], needs: Sequence[tuple[str, ...]]) -> None:
        log = layout.log(stage, *cell)
        if any(found[need].state != "done" for need in needs):
            state = "waiting"
        elif all(path.exists() for path in outputs):
            state = "done"
        else:
            state = "failed" if log.exists() else "waiting"
        found[stage, *cell] = Job(stage, cell, log, state)

    for backbone in config.backbones:
        add("backbone", (backbone,), [layout.backbone_record(backbone)], [])
        asked = [("replies", backbone, source) for source in config.data.replies]
        for job in asked:
            add("replies", job[1:], [layout.replies_record(*job[1:])], [("backbone", backbone)])
        manifests = [layout.data_manifest(backbone, split) for split in ("train", "eval")]
        add("preprocess", (backbone,), manifests, [("backbone", backbone), *asked])
    for cell in parts.cells(config):
        outputs = [layout.adapter_weights(*cell), layout.training_record(*cell)]
        add("train", _words(cell), outputs, [("preprocess", cell[0])])
    for backbone, strategy, seed, benchmark in parts.evaluations(config):
        cell = (backbone, strategy, seed)
        trained = ("train", *_words(cell)) if parts.needs_adapter(config, strategy) else ("preprocess", cell[0])
        outputs = [layout.evaluation(*cell, benchmark), layout.records(*cell, benchmark)]
        add("evaluate", (*_words(cell), benchmark), outputs, [trained])
    for cell in parts.cells(config):
        needs = [("evaluate", *_words(cell), benchmark) for benchmark in config.benchmarks]
        add("register", _words(cell), [layout.registration(*cell)], needs)
    return list(found.values())


def summary(config: Config) -> str:
    """What failed and where its log is, and what waits for it; for the end of a run."""
    every = jobs(config)
    failed = [job for job in every if job.state == "failed"]
    lines = [f"{len(failed)} job{'s' * (len(failed) != 1)} failed or did not finish:"]
    for job in failed:
        lines += [f"  {job}", f"    {job.reason()}", f"    log: {job.log}"]
    waiting = Counter(job.stage for job in every if job.state == "waiting")
    if waiting:
        counted = ", ".join(f"{count} × {stage}" for stage, count in waiting.items())
        lines.append(f"Not run because of that: {counted}.")
    lines.append(f"{progress(every)}; the same command goes on from here.")
    return "\n".join(lines)


def progress(every: list[Job]) -> str:
    """How many of a run's jobs are finished, in words."""
    return f"{sum(job.state == 'done' for job in every)} of {len(every)} jobs are finished"


def _words(cell: tuple[str, str, int] | list) -> tuple[str, str, str]:
    backbone, strategy, seed = cell
    return backbone, strategy, f"seed{seed}"
