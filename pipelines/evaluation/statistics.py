"""Means, paired differences and ratios with bootstrap intervals, clustered by document.

Questions about one document are not independent, so whole documents are resampled, each with all its
questions. Intervals are the 2.5th and 97.5th percentiles over resamples (Efron and Tibshirani 1993, chapter
13); they stay finite where the accelerated ones of the same book divide by zero, as with a metric that is 0
for every question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

LEVEL = 0.95
_RESAMPLES_AT_ONCE = 250  # bounds the memory of one batch of resamples


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: the number of resamples, and the seed that makes them the same every time."""

    samples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the estimate from the data itself; None where it isn't defined, for the reason in ``note``.
        low, high: the 95 % interval; None for fewer than two clusters, which tell nothing about others.
        n: questions.
        clusters: documents or conversations they belong to.
        note: why something is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.note is None:
            del fields["note"]
        return fields


def mean(values: ArrayLike, clusters: Sequence[str], how: Bootstrap) -> Estimate:
    """Mean over questions.

    Args:
        values: [n] one score per question; NaN where the score doesn't apply, which leaves the question out.
        clusters: [n] the document of each question.
    """
    totals = _Totals([np.asarray(values, dtype=float)], clusters)
    return totals.estimate(lambda sums, count: sums[0] / count, how)


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[str], how: Bootstrap) -> Estimate:
    """Mean of a − b over the same questions, [n] each; a question without one of them is left out."""
    return mean(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), clusters, how)


def recovery(
    none: ArrayLike, state: ArrayLike, full: ArrayLike, clusters: Sequence[str], how: Bootstrap
) -> Estimate:
    """Context recovery (state − none) / (full − none), of means over the same questions, [n] each.

    The share of what the history in the prompt is worth that the memory brings back. It has no value where
    the interval of full − none, taken so that more is better, reaches 0: a ratio to a difference that may be
    nothing says nothing. Scores for which less is better are passed negated.
    """
    columns = [np.asarray(column, dtype=float) for column in (none, state, full)]
    worth = paired_difference(columns[2], columns[0], clusters, how)
    if worth.value is None or worth.low is None or worth.low <= 0:
        interval = "" if worth.low is None else f" [{worth.low:.3g}, {worth.high:.3g}]"
        shown = "unknown" if worth.value is None else f"{worth.value:.3g}{interval}"
        note = f"full − none is {shown}, not clearly above 0"
        return Estimate(None, None, None, worth.n, worth.clusters, note)
    totals = _Totals(columns, clusters)
    return totals.estimate(lambda sums, count: (sums[1] - sums[0]) / (sums[2] - sums[0]), how)


def verdict(difference: Estimate) -> str:
    """A paired difference (more is better) in words: "better", "worse" or "can't tell at n = …"."""
    if difference.low is not None and difference.low > 0:
        return "better"
    if difference.high is not None and difference.high < 0:
        return "worse"
    return f"can't tell at n = {difference.n}"


class _Totals:
    """Sums of each column and number of questions per cluster: all that a resample of clusters needs."""

    def __init__(self, columns: list[NDArray[np.float64]], clusters: Sequence[str]):
        names = np.asarray(clusters)
        if any(column.shape != names.shape for column in columns):
            raise ValueError(
                f"one cluster per score needed, got {[c.shape for c in columns]} and {names.shape}"
            )
        known = ~np.isnan(columns).any(axis=0)
        self.n = int(known.sum())
        _, index = np.unique(names[known], return_inverse=True)
        self.counts = np.bincount(index).astype(float)
        self.sums = [np.bincount(index, weights=column[known]) for column in columns]

    def estimate(self, statistic, how: Bootstrap) -> Estimate:
        """``statistic(sums [columns, …], count […])`` on all clusters and on resamples of them."""
        clusters = len(self.counts)
        if clusters == 0:
            return Estimate(None, None, None, 0, 0, "no question has this score")

        def of_clusters(*totals: NDArray, axis: int = -1) -> NDArray:
            *sums, count = (total.sum(axis=axis) for total in totals)
            return statistic(sums, count)

        data = (*self.sums, self.counts)
        value = float(of_clusters(*data))
        if clusters == 1:
            return Estimate(value, None, None, self.n, 1, "one cluster gives no interval")
        interval = bootstrap(
            data,
            of_clusters,
            paired=True,
            vectorized=True,
            n_resamples=how.samples,
            batch=_RESAMPLES_AT_ONCE,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(how.seed),
        ).confidence_interval
        return Estimate(value, float(interval.low), float(interval.high), self.n, clusters)
