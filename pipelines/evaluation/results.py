"""From records to numbers: means per condition, effects, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from pipelines.evaluation.effects import effects
from pipelines.evaluation.records import Record
from pipelines.evaluation.statistics import Bootstrap, Estimate, mean

NLL = "nll"
"""Mean negative log-likelihood per answer token: the one score of which less is better."""


class Scores:
    """Records of one evaluation (rows of its Parquet file), arranged by question and condition."""

    def __init__(self, records: Sequence[Record] | pd.DataFrame):
        self.records = pd.DataFrame(records)
        self._clusters = self.records.drop_duplicates("question_id").set_index("question_id")["cluster_id"]

    def gains(self, metric: str) -> pd.DataFrame:
        """Questions × conditions of a metric, the NLL negated so that more is better; NaN where missing."""
        table = self.records.pivot(index="question_id", columns="condition", values=metric).astype(float)
        return -table if metric == NLL else table

    def clusters(self, questions: pd.Index) -> NDArray:
        return self._clusters[questions].to_numpy()

    def of_category(self, category: str) -> Scores:
        return Scores(self.records[self.records["category"] == category])


def summarise(
    records: Sequence[Record], costs: Sequence[dict[str, Any]], metrics: Sequence[str], how: Bootstrap
) -> dict[str, Any]:
    """The numbers of an evaluation: conditions, categories (where there are several), effects, prompts, cost.

    Args:
        costs: of every batch of work, as :meth:`Reader.cost` fills them.
    """
    scores = Scores(records)
    numbers: dict[str, Any] = {"conditions": condition_means(scores, metrics, how)}
    categories = sorted(set(scores.records["category"]))
    if len(categories) > 1:
        numbers["categories"] = {
            category: condition_means(scores.of_category(category), metrics, how) for category in categories
        }
    numbers["effects"] = named_effects(scores, metrics, how)
    full = scores.records[scores.records["condition"] == "full"]
    numbers["prompts"] = {"full": len(full), "shortened_to_the_window": int((full["left_out"] > 0).sum())}
    numbers["cost"] = total_cost(costs)
    return numbers


def condition_means(scores: Scores, metrics: Sequence[str], how: Bootstrap) -> dict[str, dict[str, Any]]:
    """{condition: {metric: estimate}}; the NLL in nats per token. A metric that no question has is left
    out."""
    measured = [metric for metric in (NLL, *metrics) if scores.records[metric].notna().any()]
    return {
        condition: {metric: _mean(scores, metric, condition, how).to_dict() for metric in measured}
        for condition in dict.fromkeys(scores.records["condition"])
    }


def named_effects(scores: Scores, metrics: Sequence[str], how: Bootstrap) -> dict[str, dict[str, Any]]:
    """{EFFECT_METRIC: estimate} of the NLL and every metric; see :mod:`pipelines.evaluation.effects`."""
    found: dict[str, dict[str, Any]] = {}
    for metric in (NLL, *metrics):
        gains = scores.gains(metric)
        columns = {metric: {str(name): column.to_numpy() for name, column in gains.items()}}
        for effect, _, estimate, judged in effects(columns, scores.clusters(gains.index), how):
            found[f"{effect}_{metric}"] = estimate.to_dict() | ({"verdict": judged} if judged else {})
    return found


def total_cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over batches, by part (a condition, or "write": the histories of state and swapped) and in all.

    Tokens are those read, written and generated, without padding; peak_bytes is the largest of any batch.
    """
    table = pd.DataFrame(costs, columns=["part", "seconds", "tokens", "peak_bytes"])
    parts = table.groupby("part", sort=False)[["seconds", "tokens"]].sum()
    return {
        **_rates(table["seconds"].sum(), table["tokens"].sum()),
        "peak_bytes": int(table["peak_bytes"].max()),
        "parts": {part: _rates(row.seconds, row.tokens) for part, row in parts.iterrows()},
    }


def _mean(scores: Scores, metric: str, condition: str, how: Bootstrap) -> Estimate:
    gains = scores.gains(metric)
    values = -gains[condition] if metric == NLL else gains[condition]
    return mean(values, scores.clusters(values.index), how)


def _rates(seconds: float, tokens: int) -> dict[str, Any]:
    per_second = float(tokens / seconds) if seconds else None
    return {"seconds": float(seconds), "tokens": int(tokens), "tokens_per_second": per_second}
