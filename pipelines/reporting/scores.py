"""Answers of every method to one benchmark on one backbone, as scores per question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config.conditions import CONDITIONS
from pipelines.errors import StageError
from pipelines.evaluation.results import NLL, Scores

Key = tuple[str, str, str]
"""Method, condition, metric."""


class Evaluation(NamedTuple):
    """One evaluation: whose, its metrics (the headline first, the NLL last), and its records' file."""

    method: str
    seed: int
    metrics: list[str]
    records: Path


class BenchmarkScores:
    """Scores [questions] of every method, condition and metric, averaged over seeds.

    Every value is a gain: more is better, so that the NLL is negated. NaN where a question has no answer, or
    no such score, in one of the seeds.

    Attributes:
        clusters, categories: [questions].
        metrics: the headline first, the NLL last.
        methods, conditions: those that have answers.
        seeds: of each method.
        gains: {(method, condition, metric): [questions]}.
        means: {(method, condition, metric): the mean gain of each seed}.
    """

    def __init__(self, backbone: str, benchmark: str, evaluations: list[Evaluation]) -> None:
        self.backbone, self.benchmark = backbone, benchmark
        self.metrics = sorted(
            dict.fromkeys(metric for evaluation in evaluations for metric in evaluation.metrics),
            key=lambda metric: metric == NLL,
        )
        self.seeds: dict[str, list[int]] = {}
        tables: dict[Key, list[pd.Series]] = {}
        questions: list[pd.DataFrame] = []
        for evaluation in evaluations:
            scores = read_scores(evaluation.records, evaluation.metrics)
            self.seeds.setdefault(evaluation.method, []).append(evaluation.seed)
            questions.append(scores.records[["question_id", "cluster_id", "category"]])
            for metric in evaluation.metrics:
                for condition, column in scores.gains(metric).items():
                    if column.notna().any():
                        tables.setdefault((evaluation.method, str(condition), metric), []).append(column)
        known = pd.concat(questions).drop_duplicates("question_id").set_index("question_id").sort_index()
        self.clusters = known["cluster_id"].to_numpy()
        self.categories = known["category"].to_numpy()
        self.gains: dict[Key, NDArray[np.float64]] = {}
        self.means: dict[Key, list[float]] = {}
        for key, columns in tables.items():
            by_seed = np.stack([column.reindex(known.index).to_numpy(dtype=float) for column in columns])
            self.gains[key] = by_seed.mean(axis=0)
            self.means[key] = np.nanmean(by_seed, axis=1).tolist()
        self.methods = list(self.seeds)
        present = {condition for _, condition, _ in tables}
        self.conditions = [condition for condition in CONDITIONS if condition in present]

    @property
    def headline(self) -> str:
        return self.metrics[0]

    def conditions_of(self, method: str, metric: str) -> list[str]:
        """The conditions under which a method has this score."""
        return [condition for condition in self.conditions if (method, condition, metric) in self.gains]

    def difference(self, ours: tuple[str, str], theirs: tuple[str, str], metric: str) -> NDArray | None:
        """[questions] gain of (method, condition) over another, None where one of them is missing."""
        a, b = self.gains.get((*ours, metric)), self.gains.get((*theirs, metric))
        return None if a is None or b is None else a - b

    def in_categories(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Every category with its questions, if there are several."""
        names = sorted(set(self.categories), key=_natural)
        if len(names) > 1:
            yield from ((name, self.categories == name) for name in names)


def read_scores(path: Path, metrics: list[str]) -> Scores:
    """The scores of a records' file. Raises StageError if it can't be read or lacks a column."""
    columns = ["question_id", "cluster_id", "category", "condition", *metrics]
    try:
        return Scores(pq.read_table(path, columns=columns).to_pandas())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise StageError(f"{path}: can't be read ({error}). Remove it and run the workflow again.") from None


def _natural(name: str) -> list[str | int]:
    """What to sort by so that "8 facts" comes before "16 facts"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
