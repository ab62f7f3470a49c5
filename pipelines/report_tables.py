"""The report's tables: every cell under every condition, as data for the page and as Markdown and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipelines.report_data import CELL, CONDITIONS, EFFECTS, Results

LOWER_IS_BETTER = {"nll"}
HEADINGS = {"memory_effect": "memory effect", "context_recovery": "context recovery"}


class Estimate(NamedTuple):
    """A number as it is shown: its text, its interval, and a word on what it says (for effects)."""

    text: str
    interval: str
    verdict: str


class Table(NamedTuple):
    """One metric of one benchmark: a row per cell, with None where a condition wasn't measured."""

    benchmark: str
    metric: str
    direction: str
    headings: list[str]
    rows: list[tuple[tuple[str, str, int], list[Estimate | None]]]


def tables(results: Results) -> list[Table]:
    found = []
    metrics = results.numbers[["benchmark", "metric"]].drop_duplicates()
    for benchmark, metric in metrics.itertuples(index=False):
        chosen = results.numbers[
            (results.numbers["benchmark"] == benchmark) & (results.numbers["metric"] == metric)
        ]
        names = list(dict.fromkeys(chosen["name"]))
        columns = sorted(names, key=lambda name: _order(name, names))
        rows = []
        for cell, group in chosen.groupby(CELL, sort=False):
            by_name = {row["name"]: row for row in group.to_dict("records")}
            rows.append((cell, [_shown(by_name.get(column)) for column in columns]))
        direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
        headings = [HEADINGS.get(name, name) for name in columns]
        found.append(Table(benchmark, metric, direction, headings, rows))
    return found


def write_csv(results: Results, path: Path) -> None:
    """Every number, one a row, at full precision."""
    results.numbers.to_csv(path, index=False)


def markdown(found: list[Table]) -> str:
    """The tables as Markdown, intervals in brackets."""
    parts = []
    for table in found:
        lines = [f"### {table.benchmark}, {table.metric} ({table.direction}; 95 % intervals)", ""]
        lines.append(_row(["backbone", "strategy", "seed", *table.headings]))
        lines.append(_row(["---"] * (3 + len(table.headings))))
        for cell, estimates in table.rows:
            texts = ["–" if e is None else f"{e.text} {e.interval}".strip() for e in estimates]
            lines.append(_row([*map(str, cell), *texts]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _order(name: str, names: list[str]) -> tuple[int, int]:
    known = [*CONDITIONS, *EFFECTS]
    if name in CONDITIONS:
        return 0, known.index(name)
    return (2, known.index(name)) if name in EFFECTS else (1, names.index(name))


def _shown(row: dict[str, Any] | None) -> Estimate | None:
    if row is None:
        return None
    if pd.isna(row["value"]):
        return Estimate("undefined", "", row["note"])
    bounded = not (pd.isna(row["low"]) or pd.isna(row["high"]))
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if bounded else ""
    return Estimate(f"{row['value']:.3f}", interval, row["verdict"])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
