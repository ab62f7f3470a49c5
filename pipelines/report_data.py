"""Gathers what a run has produced so far, finished or not, for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import parts
from pipelines.config import FROZEN, Config
from pipelines.errors import StageError
from pipelines.layout import Layout
from pipelines.run_status import Job, jobs

CELL = ["backbone", "strategy", "seed"]
COLUMNS = [*CELL, "benchmark", "kind", "name", "metric", "value", "low", "high", "n", "verdict", "note"]
EFFECTS = ("memory_effect", "context_recovery")
CONDITIONS = ("none", "state", "swapped", "full")


@dataclass
class Results:
    """Everything a report shows.

    Attributes:
        numbers: one row per estimate, with COLUMNS; kind is "condition" or "effect", name which one.
        curves: training curve per (backbone, strategy, seed), one row per optimiser step.
        samples: answers to the same few questions, see ``sample_answers``.
        costs: one row per evaluation.
        records: {label: JSON record} of backbones, episodes, training cells and registered models.
        unfinished: jobs that failed or wait.
    """

    numbers: pd.DataFrame
    curves: dict[tuple[str, str, int], pd.DataFrame]
    samples: list[dict[str, Any]]
    costs: pd.DataFrame
    backbones: dict[str, dict[str, Any]] = field(default_factory=dict)
    episodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    registered: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    champions: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: list[Job] = field(default_factory=list)


def gather(config: Config) -> Results:
    """Reads the results of every job that is done. Raises StageError for a file that can't be read."""
    layout = Layout(config)
    every = jobs(config)
    done = {(job.stage, *job.cell) for job in every if job.state == "done"}
    numbers, costs, samples = [], [], []
    for backbone, strategy, seed, benchmark in parts.evaluations(config):
        cell = (backbone, strategy, seed)
        if ("evaluate", backbone, strategy, f"seed{seed}", benchmark) not in done:
            continue
        result = read_json(layout.evaluation(*cell, benchmark))
        key = dict(zip([*CELL, "benchmark"], (*cell, benchmark), strict=True))
        numbers += [key | row for row in _estimates(result)]
        costs.append(
            key | {name: value for name, value in result["cost"].items() if not isinstance(value, dict)}
        )
    for backbone in config.backbones:
        for benchmark in config.benchmarks:
            samples += sample_answers(config, backbone, benchmark)
    cells = [cell for cell in parts.cells(config) if ("train", *cell[:2], f"seed{cell[2]}") in done]
    return Results(
        numbers=pd.DataFrame(numbers, columns=COLUMNS),
        curves={cell: pd.read_csv(layout.curve(*cell)) for cell in cells if layout.curve(*cell).exists()},
        samples=samples,
        costs=pd.DataFrame(costs),
        backbones=_present({name: layout.backbone_record(name) for name in config.backbones}),
        episodes=_present(
            {
                f"{name}, {split}": layout.data_manifest(name, split)
                for name in config.backbones
                for split in ("train", "eval")
            }
        ),
        training={cell: read_json(layout.training_record(*cell)) for cell in cells},
        registered=_present({cell: layout.registration(*cell) for cell in cells}),
        champions=_present({name: layout.champion(name) for name in config.backbones}),
        unfinished=[job for job in every if job.state != "done"],
    )


def sample_answers(config: Config, backbone: str, benchmark: str) -> list[dict[str, Any]]:
    """The first questions of a benchmark with every answer, of the first seed of each strategy.

    Returns [{backbone, benchmark, question_id, question (or None), references, answers: {strategy:
    {condition: text}}}, …].
    """
    layout, wanted = Layout(config), config.report.sample_questions
    found: dict[str, dict[str, Any]] = {}
    for strategy, seed in [(FROZEN, 0), *((name, config.seeds[0]) for name in config.strategies)]:
        path = layout.records(backbone, strategy, seed, benchmark)
        if not wanted or not path.exists():
            continue
        records = pd.read_parquet(path)
        for question_id in list(dict.fromkeys(records["question_id"]))[:wanted]:
            rows = records[records["question_id"] == question_id]
            first = rows.iloc[0]
            entry = found.setdefault(
                question_id,
                {
                    "backbone": backbone,
                    "benchmark": benchmark,
                    "question_id": question_id,
                    "question": first.get("question"),
                    "references": list(first["references"]),
                    "answers": {},
                },
            )
            entry["answers"][strategy] = dict(zip(rows["condition"], rows["prediction"], strict=True))
    return list(found.values())[:wanted]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(f"{path}: can't be read ({error}). Remove it and run the workflow again.") from None


def _present(paths: dict[Any, Path]) -> dict[Any, dict[str, Any]]:
    return {key: read_json(path) for key, path in paths.items() if path.exists()}


def _estimates(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for condition, metrics in result["conditions"].items():
        for metric, estimate in metrics.items():
            rows.append({"kind": "condition", "name": condition, "metric": metric, **_interval(estimate)})
    for effect, estimate in result["effects"].items():
        name = next((known for known in EFFECTS if effect.startswith(f"{known}_")), effect)
        metric = effect.removeprefix(f"{name}_") if name != effect else ""
        rows.append({"kind": "effect", "name": name, "metric": metric, **_interval(estimate)})
    return rows


def _interval(estimate: dict[str, Any]) -> dict[str, Any]:
    words = {key: estimate.get(key, "") for key in ("verdict", "note")}
    return {key: estimate[key] for key in ("value", "low", "high", "n")} | words
