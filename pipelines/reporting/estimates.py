"""Every number of the report with its interval: conditions, categories, effects and comparisons.

Seeds are averaged per question before questions are resampled, so that an interval tells how sure the mean of
these seeds is for other documents; how much seeds differ is told by the lowest and highest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.config import FROZEN
from pipelines.evaluation.effects import EFFECTS, effects
from pipelines.evaluation.results import NLL
from pipelines.evaluation.statistics import Bootstrap, Estimate, means, verdict
from pipelines.reporting.methods import Methods
from pipelines.reporting.scores import BenchmarkScores

COLUMNS = ["backbone", "benchmark", "method", "seeds", "kind", "name", "against", "category", "metric", "value",
           "low", "high", "n", "clusters", "seed_low", "seed_high", "verdict", "note"]  # fmt: skip
_NUMBERS = ("value", "low", "high", "seed_low", "seed_high")


class Comparison(NamedTuple):
    """One method under one condition against another, or against itself under another.

    ``name`` says what is asked by it.
    """

    name: str
    ours: tuple[str, str]
    theirs: tuple[str, str]


def comparisons(methods: Methods, scores: BenchmarkScores) -> Iterator[Comparison]:
    """What is compared on a benchmark, of the methods that were evaluated on it."""
    control = methods.adaptation_control
    for name in scores.methods:
        if name != FROZEN:
            yield Comparison("full_vs_frozen", (name, "full"), (FROZEN, "full"))
        if name in methods.trained and control not in (None, name):
            yield Comparison("full_vs_control", (name, "full"), (control, "full"))
            yield Comparison("state_vs_control", (name, "state"), (control, "none"))
        if name in methods.with_memory:
            yield Comparison("state_vs_none", (name, "state"), (name, "none"))
        if methods.plain and name in methods.variants:
            for condition in ("full", "state"):
                yield Comparison(f"{condition}_vs_plain", (name, condition), (methods.plain, condition))
    for one, other in combinations([name for name in scores.methods if name in methods.main], 2):
        for condition in ("full", "state"):
            yield Comparison(f"{condition}_pair", (one, condition), (other, condition))


def estimate(scores: BenchmarkScores, methods: Methods, how: Bootstrap) -> pd.DataFrame:
    """All numbers of one benchmark on one backbone, a row each, with COLUMNS.

    Kinds: "condition" (name: the condition; NLL in nats per token, not negated), "category" (the same for
    some of the questions), "effect" (name: one of EFFECTS) and "comparison" (name and ``against``: see
    :func:`comparisons`). Differences are gains: positive is better for every metric.
    """
    columns = [*_conditions(scores), *_comparisons(scores, methods)]
    found = means(np.stack([values for _, values in columns], axis=1), scores.clusters, how)
    rows = [
        _row(scores, row, value, verdict(value) if row["kind"] == "comparison" else "")
        for (row, _), value in zip(columns, found, strict=True)
    ]
    numbers = pd.DataFrame([*rows, *_effects(scores, how)], columns=COLUMNS)
    return numbers.astype(dict.fromkeys(_NUMBERS, float))


def _conditions(scores: BenchmarkScores) -> Iterator[tuple[dict[str, Any], NDArray[np.float64]]]:
    """Every score by condition, over all questions and by category: what its row says, and [questions]."""
    for (method, condition, metric), gains in scores.gains.items():
        sign = -1 if metric == NLL else 1
        row = {"method": method, "name": condition, "metric": metric}
        spread = _spread(sign * mean for mean in scores.means[method, condition, metric])
        yield row | {"kind": "condition"} | spread, sign * gains
        for category, inside in scores.in_categories():
            yield row | {"kind": "category", "category": category}, np.where(inside, sign * gains, np.nan)


def _comparisons(scores: BenchmarkScores, methods: Methods) -> Iterator[tuple[dict[str, Any], NDArray[np.float64]]]:
    """What is compared, likewise: [questions] differences."""
    for metric in scores.metrics:
        for name, ours, theirs in comparisons(methods, scores):
            gains = scores.difference(ours, theirs, metric)
            if gains is not None:
                row = {"method": ours[0], "kind": "comparison", "name": name, "metric": metric}
                yield row | {"against": theirs[0]}, gains


def _effects(scores: BenchmarkScores, how: Bootstrap) -> Iterator[dict[str, Any]]:
    by_metric = {
        (metric, method): {name: scores.gains[method, name, metric] for name in scores.conditions_of(method, metric)}
        for metric in scores.metrics
        for method in scores.methods
    }
    for name, (metric, method), value, judged in effects(by_metric, scores.clusters, how):
        row: dict[str, Any] = {"method": method, "kind": "effect", "name": name, "metric": metric}
        if EFFECTS[name].is_difference:
            of_seeds = (scores.means[method, condition, metric] for condition in EFFECTS[name].needs)
            row |= _spread(ours - theirs for ours, theirs in zip(*of_seeds, strict=True))
        yield _row(scores, row, value, judged)


def _row(scores: BenchmarkScores, row: dict[str, Any], value: Estimate, judged: str) -> dict[str, Any]:
    return {
        "backbone": scores.backbone,
        "benchmark": scores.benchmark,
        "seeds": " ".join(map(str, scores.seeds[row["method"]])),
        "against": "",
        "category": "",
        "seed_low": None,
        "seed_high": None,
        "verdict": judged,
        "note": "",
        **row,
        **value.to_dict(),
    }


def _spread(values: Iterator[float]) -> dict[str, float]:
    """The lowest and highest seed, if there are several."""
    known: Sequence[float] = list(values)
    return {"seed_low": min(known), "seed_high": max(known)} if len(known) > 1 else {}
