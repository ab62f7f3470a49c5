"""Means, paired differences and ratios with bootstrap intervals, clustered by document.

Questions about one document are not independent, so whole documents are resampled, each with all its
questions. Intervals are the 2.5th and 97.5th percentiles over resamples (Efron and Tibshirani 1993, chapter
13); they stay finite where the accelerated ones of the same book divide by zero, as with a metric that is 0
for every question.

A resample is how often it has each cluster, so that all resamples of many scores are one matrix product:
thousands of intervals take seconds. It is written out here because scipy's ``bootstrap`` resamples single values: it
has neither clusters nor ratios of sums over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_COUNTS_AT_ONCE = 4_000_000  # resamples × clusters held at once: bounds the memory
_COLUMNS_AT_ONCE = 256  # likewise: all resamples of so many columns are held at once


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


def mean(values: ArrayLike, clusters: Sequence[str] | NDArray, how: Bootstrap) -> Estimate:
    """Mean over questions.

    Args:
        values: [n] one score per question; NaN where the score doesn't apply, which leaves the question out.
        clusters: [n] the document of each question.
    """
    return means(_column(values), clusters, how)[0]


def means(values: NDArray[np.float64], clusters: Sequence[str] | NDArray, how: Bootstrap) -> list[Estimate]:
    """:func:`mean` of every column of ``values`` [n, K]."""
    return _ratios(values, np.ones_like(values), clusters, how)


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Sequence[str] | NDArray, how: Bootstrap) -> Estimate:
    """Mean of a − b over the same questions, [n] each; a question without one of them is left out."""
    return paired_differences(_column(a), _column(b), clusters, how)[0]


def paired_differences(
    a: NDArray[np.float64], b: NDArray[np.float64], clusters: Sequence[str] | NDArray, how: Bootstrap
) -> list[Estimate]:
    """:func:`paired_difference` of every column of [n, K]."""
    return means(a - b, clusters, how)


def recovery(
    none: ArrayLike, state: ArrayLike, full: ArrayLike, clusters: Sequence[str] | NDArray, how: Bootstrap
) -> Estimate:
    """Context recovery (state − none) / (full − none), of means over the same questions, [n] each.

    The share of what the history in the prompt is worth that the memory brings back. It has no value where
    the interval of full − none, taken so that more is better, reaches 0, or some resamples have a difference
    of exactly 0: a ratio to what may be nothing says nothing. Scores for which less is better are passed
    negated.
    """
    return recoveries(*(_column(values) for values in (none, state, full)), clusters, how)[0]


def recoveries(
    none: NDArray[np.float64],
    state: NDArray[np.float64],
    full: NDArray[np.float64],
    clusters: Sequence[str] | NDArray,
    how: Bootstrap,
) -> list[Estimate]:
    """:func:`recovery` of every column of [n, K]."""
    shares = _ratios(state - none, full - none, clusters, how)
    worths = means(full - none, clusters, how)
    doubts = [_doubt(share, worth) for share, worth in zip(shares, worths, strict=True)]
    return [
        share if doubt is None else Estimate(None, None, None, worth.n, worth.clusters, doubt)
        for share, worth, doubt in zip(shares, worths, doubts, strict=True)
    ]


def verdict(difference: Estimate) -> str:
    """A paired difference (more is better) in words: "better", "worse" or "can't tell at n = …"."""
    if difference.low is not None and difference.low > 0:
        return "better"
    if difference.high is not None and difference.high < 0:
        return "worse"
    return f"can't tell at n = {difference.n}"


def _column(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=float)[:, None]


def _doubt(share: Estimate, worth: Estimate) -> str | None:
    """Why the difference that a share is of, full − none, may be nothing."""
    interval = "" if worth.low is None else f" [{worth.low:.3g}, {worth.high:.3g}]"
    shown = "unknown" if worth.value is None else f"{worth.value:.3g}{interval}"
    if worth.low is None or worth.low <= 0:
        return f"full − none is {shown}, not clearly above 0"
    if share.low is None or not np.isfinite([share.low, share.high]).all():
        return f"full − none is {shown}, and 0 in some resamples"
    return None


def _ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    clusters: Sequence[str] | NDArray,
    how: Bootstrap,
) -> list[Estimate]:
    """Sum of numerators / sum of denominators, for every column of [n, K]; a question with NaN is left out."""
    names = np.asarray(clusters)
    if numerators.shape[:1] != names.shape or denominators.shape != numerators.shape:
        raise ValueError(
            f"one cluster per score needed, got {numerators.shape}, {denominators.shape} and {names.shape}"
        )
    known = ~np.isnan(numerators + denominators)
    _, index = np.unique(names, return_inverse=True)
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))

    def by_cluster(values: NDArray) -> NDArray[np.float64]:
        kept = np.where(known, values, 0.0)[order]
        return np.add.reduceat(kept, starts, axis=0) if len(kept) else np.zeros((0, kept.shape[1]))

    tops, bottoms, counts = (by_cluster(values) for values in (numerators, denominators, known))
    found: dict[int, Estimate] = {}
    # clusters without a question that counts are not drawn: columns are resampled with those they share
    patterns, pattern_of = np.unique(counts > 0, axis=1, return_inverse=True)
    for number, present in enumerate(patterns.T):
        columns = np.flatnonzero(pattern_of.ravel() == number)
        for block in (columns[i : i + _COLUMNS_AT_ONCE] for i in range(0, len(columns), _COLUMNS_AT_ONCE)):
            chosen = np.ix_(present, block)
            estimates = _with_intervals(tops[chosen], bottoms[chosen], counts[chosen], how)
            found |= zip(block.tolist(), estimates, strict=True)
    return [found[column] for column in range(counts.shape[1])]


def _with_intervals(
    tops: NDArray[np.float64], bottoms: NDArray[np.float64], counts: NDArray[np.float64], how: Bootstrap
) -> list[Estimate]:
    """Ratios of the sums of columns [clusters, K], all of whose clusters count; none without any cluster."""
    clusters, columns = tops.shape
    if clusters == 0:
        return [Estimate(None, None, None, 0, 0, "no question has this score")] * columns
    questions = counts.sum(axis=0).astype(int).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (tops.sum(axis=0) / bottoms.sum(axis=0)).tolist()
        if clusters == 1:
            note = "one cluster gives no interval"
            return [Estimate(v, None, None, n, 1, note) for v, n in zip(values, questions, strict=True)]
        distinct, which = np.unique(bottoms, axis=1, return_inverse=True)
        drawn = [(times @ tops) / (times @ distinct)[:, which.ravel()] for times in _resamples(clusters, how)]
        tail = 50 * (1 - LEVEL)
        lows, highs = np.percentile(np.concatenate(drawn), [tail, 100 - tail], axis=0).tolist()
    return [
        Estimate(value, low, high, n, clusters)
        for value, low, high, n in zip(values, lows, highs, questions, strict=True)
    ]


def _resamples(clusters: int, how: Bootstrap) -> Iterator[NDArray[np.float64]]:
    """How often each cluster is drawn, [some resamples, clusters] at a time."""
    random = np.random.default_rng(how.seed)
    at_once = max(1, _COUNTS_AT_ONCE // clusters)
    for first in range(0, how.samples, at_once):
        rows = min(at_once, how.samples - first)
        drawn = random.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(float)
