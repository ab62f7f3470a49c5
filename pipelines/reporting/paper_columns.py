"""Our numbers in the paper's columns: which benchmark and metric a column is, and what is made of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipelines.config import FROZEN, Config
from pipelines.reporting.gather import Results
from pipelines.reporting.tables import NOTHING, TableCell, number

FINAL = ("ifeval", "hotpotqa_em", "gpqa", "mab", "locomo")
"""The columns whose mean the paper calls Final."""

AS_FROZEN = "as frozen"
"""What the paper writes where a method changes nothing."""

COMPETENCIES = ("AR", "TTL", "LRU", "CR")

_BENCHMARKS: dict[str, tuple[Callable[[Any], bool], str | None]] = {
    "ifeval": (lambda b: b.kind == "lm_eval" and b.task == "ifeval", None),
    "hotpotqa_em": (lambda b: b.kind == "hotpotqa", "exact_match"),
    "hotpotqa_f1": (lambda b: b.kind == "hotpotqa", "f1"),
    "gpqa": (lambda b: b.kind == "lm_eval" and b.task.startswith("gpqa_diamond"), None),
    "locomo": (lambda b: b.kind == "locomo", "f1"),
}
"""Which of our benchmarks a column is, and its metric (None: the headline)."""


class OurColumns:
    """Our results on one backbone, in per cent, by the paper's columns."""

    def __init__(self, config: Config, results: Results, backbone: str, headings: Mapping[str, str]) -> None:
        self._config, self._results, self.backbone, self._headings = config, results, backbone, headings
        self._numbers = results.numbers[results.numbers["backbone"] == backbone]

    def cell(self, column: str, method: str | None, condition: str = "full") -> TableCell:
        """A number with its interval; means over several numbers have none. A dash where we have nothing."""
        if method is None:
            return NOTHING
        if column in _BENCHMARKS:
            row = self._row(column, method, condition)
            if row is None and self._is_frozens(column, method):
                return TableCell(AS_FROZEN)
            return NOTHING if row is None else number(row, 100, 2)
        if column == "mean":
            return _mean([self.value(name, method, condition) for name in ("hotpotqa_em", "locomo")])
        if column == "final":
            return self._final(method, condition)
        return _mean([self.value(column, method, condition)])

    def value(self, column: str, method: str, condition: str = "full") -> float | None:
        if column in _BENCHMARKS:
            row = self._row(column, method, condition)
            if row is None and self._is_frozens(column, method):
                return self.value(column, FROZEN, condition)
            return None if row is None else 100 * row["value"]
        return self._mab(("TTL",) if column == "mab_ttl" else COMPETENCIES, method, condition)

    def questions(self, column: str) -> int | None:
        """How many questions our benchmark of a column has; None where we have none."""
        if column in ("final", "mean"):
            return None
        rows = self._numbers[self._numbers["benchmark"].isin(self._named(column))]
        return None if rows.empty else int(rows["n"].max())

    def _final(self, method: str, condition: str) -> TableCell:
        values = {column: self.value(column, method, condition) for column in FINAL}
        missing = [column for column, value in values.items() if value is None]
        if missing == list(FINAL):
            return NOTHING
        if missing:
            return TableCell(note=f"no {', '.join(self._headings[column] for column in missing)}")
        return _mean(list(values.values()))

    def _is_frozens(self, column: str, method: str) -> bool:
        """Whether a method changes nothing there: a baseline that shortens histories, where there are none."""
        without_history = column in ("ifeval", "gpqa") and self._row(column, FROZEN, "full") is not None
        return without_history and method not in (FROZEN, *self._results.methods.trained)

    def _mab(self, competencies: Sequence[str], method: str, condition: str) -> float | None:
        """Of MemoryAgentBench's competencies: the mean over each one's sources, then over them; under the protocol of
        δ-mem's release the mean of all questions. None where one of them has no score."""
        rows = self._of("category", self._named("mab"), "score", method, condition)
        parts = [rows[rows["category"].str.startswith(f"{name}/")] for name in competencies]
        if any(part.empty for part in parts):
            return None
        if getattr(self._config.benchmarks[self._named("mab")[0]], "protocol", None) == "release":
            every = pd.concat(parts)
            return 100 * float((every["value"] * every["n"]).sum() / every["n"].sum())
        return 100 * sum(float(part["value"].mean()) for part in parts) / len(parts)

    def _row(self, column: str, method: str, condition: str) -> dict[str, Any] | None:
        names, metric = self._named(column), _BENCHMARKS[column][1]
        if not names:
            return None
        metric = metric or self._results.headlines.get((self.backbone, names[0]), [""])[0]
        rows = self._of("condition", names[:1], metric, method, condition)
        return None if rows.empty else rows.iloc[0].to_dict()

    def _named(self, column: str) -> list[str]:
        """Our benchmarks that a column could be, the first of which counts."""
        if column.startswith("mab"):
            chosen = [n for n, b in self._config.benchmarks.items() if b.kind == "memory_agent_bench"]
        else:
            is_it = _BENCHMARKS[column][0]
            chosen = [name for name, benchmark in self._config.benchmarks.items() if is_it(benchmark)]
        return chosen[:1]

    def _of(self, kind: str, benchmarks: list[str], metric: str, method: str, condition: str) -> pd.DataFrame:
        rows = self._numbers[(self._numbers["kind"] == kind) & (self._numbers["metric"] == metric)]
        rows = rows[rows["benchmark"].isin(benchmarks) & (rows["name"] == condition)]
        return rows[(rows["method"] == method) & rows["value"].notna()]


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _mean(values: list[float | None]) -> TableCell:
    value = _average(values)
    return NOTHING if value is None else TableCell(f"{value:.2f}")
