"""What a cell's evaluations say in single numbers, and which cell is best by one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipelines.config import Config


def final_metrics(evaluations: dict[str, dict[str, Any]]) -> dict[str, float]:
    """{"benchmark/condition/metric" or "benchmark/effect": value}, with intervals under …/low and …/high."""
    found = {
        f"{name}{suffix}": estimate[key]
        for name, estimate in _estimates(evaluations)
        for suffix, key in (("", "value"), ("/low", "low"), ("/high", "high"))
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def champion_score(config: Config, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{score: the value that champions are chosen by, no_champion: why this cell can't be one, or None}.

    The score is None where the evaluations don't have that metric, which rules the cell out, and where its value is
    undefined, which puts it behind all others.
    """
    metric, estimates = config.registry.champion_metric, dict(_estimates(evaluations))
    if metric in estimates:
        return {"score": estimates[metric]["value"], "no_champion": None}
    benchmark = metric.split("/")[0]
    known = ", ".join(sorted(name for name in estimates if name.startswith(f"{benchmark}/")))
    return {"score": None, "no_champion": f"its evaluations have no {metric!r}; they have {known}"}


def best_of(config: Config, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of some cells' records that can be champion; None if none can."""
    sign = 1 if config.registry.higher_is_better else -1
    able = [record for record in records if not record.get("no_champion")]
    return max(able, key=lambda r: -math.inf if r["score"] is None else sign * r["score"], default=None)


def _estimates(evaluations: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for benchmark, result in evaluations.items():
        for condition, metrics in result["conditions"].items():
            for metric, estimate in metrics.items():
                yield f"{benchmark}/{condition}/{metric}", estimate
        for effect, estimate in result["effects"].items():
            yield f"{benchmark}/{effect}", estimate
