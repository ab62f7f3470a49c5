"""Gathers what a run has produced so far, finished or not, for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipelines.config import Config
from pipelines.evaluation.intake import told
from pipelines.evaluation.results import NLL
from pipelines.evaluation.statistics import Bootstrap
from pipelines.reporting.estimates import COLUMNS, estimate
from pipelines.reporting.methods import Methods
from pipelines.reporting.samples import Sample, sample_answers
from pipelines.reporting.scores import BenchmarkScores, Evaluation
from pipelines.run import parts
from pipelines.run.files import read_record
from pipelines.run.layout import Layout
from pipelines.run.status import Job, jobs

REMEDY = "Remove it and run the workflow again."
"""For a file that can't be read."""

CellKey = tuple[str, str, int]
"""Backbone, strategy, seed."""


@dataclass
class Results:
    """Everything a report shows.

    Attributes:
        methods: what the run compares.
        headlines: {(backbone, benchmark): its metrics, the headline first}, of the benchmarks that have answers.
        numbers: one row per estimate, see :func:`pipelines.reporting.estimates.estimate`.
        costs: one row per evaluation and part of its work, see :func:`_costs`.
        shortened: {(backbone, benchmark): share of the prompts that had no room for all of the history}.
        damage: {(backbone, benchmark): what of its data had to be mended, in sentences}.
        samples: answers of all methods but the ablations' to the same few questions.
        curves: training curves, one row per optimiser step.
        backbones, episodes, training, registered, champions: the JSON records of what is there.
        unfinished: jobs that failed or wait.
    """

    methods: Methods
    headlines: dict[tuple[str, str], list[str]]
    numbers: pd.DataFrame
    costs: pd.DataFrame
    shortened: dict[tuple[str, str], float]
    damage: dict[tuple[str, str], list[str]]
    samples: list[Sample]
    curves: dict[CellKey, pd.DataFrame]
    backbones: dict[str, dict[str, Any]]
    episodes: dict[str, dict[str, Any]]
    training: dict[CellKey, dict[str, Any]]
    registered: dict[CellKey, dict[str, Any]]
    champions: dict[str, dict[str, Any]]
    unfinished: list[Job]


def gather(config: Config) -> Results:
    """Reads the results of every job that is done. Raises StageError for a file that can't be read."""
    layout, methods = Layout(config), Methods(config)
    every = jobs(config)
    done = {(job.stage, *job.cell) for job in every if job.state == "done"}
    evaluated = _evaluated(config, methods, done)
    found = {key: _answers(config, methods, *key, cells) for key, cells in evaluated.items()}
    trained = [cell for cell in parts.cells(config) if ("train", *cell[:2], f"seed{cell[2]}") in done]
    manifests = {
        f"{name}, {split}": layout.data_manifest(name, split)
        for name in config.backbones
        for split in ("train", "eval")
    }
    return Results(
        methods=methods,
        headlines={key: answers.metrics for key, answers in found.items()},
        numbers=pd.concat([a.numbers for a in found.values()], ignore_index=True)
        if found
        else pd.DataFrame(columns=COLUMNS),
        costs=pd.DataFrame([row for answers in found.values() for row in answers.costs], columns=COST_COLUMNS),
        shortened={key: answers.shortened for key, answers in found.items()},
        damage={key: answers.damage for key, answers in found.items()},
        samples=[sample for answers in found.values() for sample in answers.samples],
        curves={c: pd.read_csv(layout.curve(*c)) for c in trained if layout.curve(*c).exists()},
        backbones=_present({name: layout.backbone_record(name) for name in config.backbones}),
        episodes=_present(manifests),
        training={cell: read_record(layout.training_record(*cell), REMEDY) for cell in trained},
        registered=_present({cell: layout.registration(*cell) for cell in trained}),
        champions=_present({name: layout.champion(name) for name in config.backbones}),
        unfinished=[job for job in every if job.state != "done"],
    )


class _Answers(NamedTuple):
    """Of all methods to one benchmark on one backbone; the fields are those of :class:`Results`."""

    metrics: list[str]
    numbers: pd.DataFrame
    costs: list[dict[str, Any]]
    shortened: float
    damage: list[str]
    samples: list[Sample]


def _answers(config: Config, methods: Methods, backbone: str, benchmark: str, cells: list[CellKey]) -> _Answers:
    layout = Layout(config)
    results = {cell: read_record(layout.evaluation(*cell, benchmark), REMEDY) for cell in cells}
    evaluations = [
        Evaluation(cell[1], cell[2], _metrics(result), layout.records(*cell, benchmark))
        for cell, result in results.items()
    ]
    scores = BenchmarkScores(backbone, benchmark, evaluations)
    prompts = [result["prompts"] for result in results.values()]
    full = sum(count["full"] for count in prompts)
    shown = [evaluation for evaluation in evaluations if evaluation.method in methods.main]
    return _Answers(
        scores.metrics,
        estimate(scores, methods, Bootstrap(config.evaluate.bootstrap_samples, config.evaluate.seed)),
        [row for cell, result in results.items() for row in _costs(cell, benchmark, result)],
        sum(count["shortened_to_the_window"] for count in prompts) / full if full else 0.0,
        list(dict.fromkeys(words for result in results.values() for words in told(result.get("records", {})))),
        sample_answers(scores, shown, config.report.sample_questions),
    )


COST_COLUMNS = [
    "backbone",
    "method",
    "seed",
    "benchmark",
    "part",
    "seconds",
    "tokens",
    "questions",
    "peak_bytes",
]


def _costs(cell: CellKey, benchmark: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each condition and each other part of the work, such as "write"; questions: of the condition,
    or of the whole evaluation."""
    asked = {name: max(e["n"] for e in metrics.values()) for name, metrics in result["conditions"].items()}
    cost, key = result["cost"], dict(zip(("backbone", "method", "seed"), cell, strict=True))
    return [
        key
        | {"benchmark": benchmark, "part": part, "seconds": spent["seconds"], "tokens": spent["tokens"]}
        | {"questions": asked.get(part, max(asked.values())), "peak_bytes": cost["peak_bytes"]}
        for part, spent in cost["parts"].items()
    ]


def _metrics(result: dict[str, Any]) -> list[str]:
    """Of an evaluation's result: the headline first, the NLL last."""
    names = dict.fromkeys(metric for metrics in result["conditions"].values() for metric in metrics)
    return sorted(names, key=lambda metric: metric == NLL)


def _evaluated(config: Config, methods: Methods, done: set) -> dict[tuple[str, str], list[CellKey]]:
    """Finished evaluations by backbone and benchmark, in the order of methods."""
    found: dict[tuple[str, str], list[CellKey]] = {}
    ordered = sorted(parts.evaluations(config), key=lambda cell: methods.names.index(cell[1]))
    for backbone in config.backbones:
        for benchmark in config.benchmarks:
            cells = [
                (b, strategy, seed)
                for b, strategy, seed, name in ordered
                if (b, name) == (backbone, benchmark) and ("evaluate", b, strategy, f"seed{seed}", name) in done
            ]
            if cells:
                found[backbone, benchmark] = cells
    return found


def _present(paths: dict[Any, Path]) -> dict[Any, dict[str, Any]]:
    return {key: read_record(path, REMEDY) for key, path in paths.items() if path.exists()}
