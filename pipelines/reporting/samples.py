"""A few questions of a benchmark with the answer of every method under every condition."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import pyarrow.parquet as pq

from pipelines.reporting.scores import BenchmarkScores, Evaluation

_COLUMNS = ["question_id", "category", "condition", "question", "prediction", "references"]
_LONGEST = 600  # characters of a text that are shown


@dataclass
class Sample:
    """One question; ``answers`` is {method: {condition: text}}."""

    backbone: str
    benchmark: str
    question: str
    category: str
    references: list[str]
    answers: dict[str, dict[str, str]] = field(default_factory=dict)


def sample_answers(scores: BenchmarkScores, evaluations: list[Evaluation], wanted: int) -> list[Sample]:
    """``wanted`` questions spread over the benchmark and its categories, answered by each method's first seed."""
    chosen: dict[str, Sample] = {}
    seen: set[str] = set()
    for evaluation in evaluations:
        if not wanted or evaluation.method in seen:
            continue
        seen.add(evaluation.method)
        names = set(pq.read_schema(evaluation.records).names)
        records = pq.read_table(evaluation.records, columns=[c for c in _COLUMNS if c in names]).to_pandas()
        if not chosen:
            chosen = {row["question_id"]: _sample(scores, row) for row in _spread(records, wanted)}
        asked = records[records["question_id"].isin(list(chosen))]
        for question_id, condition, text in zip(
            asked["question_id"], asked["condition"], asked["prediction"], strict=True
        ):
            chosen[question_id].answers.setdefault(evaluation.method, {})[condition] = _cut(text)
    return list(chosen.values())


def _spread(records: pd.DataFrame, wanted: int) -> list[dict]:
    """Rows of as many different questions, from category after category, evenly over each."""
    questions = records.drop_duplicates("question_id")
    groups = [group for _, group in questions.groupby("category")]
    found = []
    for number, group in enumerate(groups):
        share = min(len(group), wanted // len(groups) + (number < wanted % len(groups)))
        found += [group.iloc[(2 * i + 1) * len(group) // (2 * share)].to_dict() for i in range(share)]
    return found


def _sample(scores: BenchmarkScores, row: dict) -> Sample:
    asked = row.get("question") or row["question_id"]  # tasks of lm-evaluation-harness don't tell it
    references = [_cut(reference) for reference in row["references"]]
    return Sample(scores.backbone, scores.benchmark, _cut(asked), row["category"], references)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
