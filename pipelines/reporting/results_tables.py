"""Our results as tables: scores, effects, categories and comparisons of every benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from pipelines.config import FROZEN
from pipelines.config.conditions import CONDITIONS
from pipelines.evaluation.effects import EFFECTS
from pipelines.evaluation.results import NLL
from pipelines.reporting.gather import Results
from pipelines.reporting.tables import NOTHING, Row, Table, TableCell, fill, heading, number

QUESTIONS = {
    "full_vs_frozen": "full: against the frozen backbone",
    "full_vs_control": "full: against {control}",
    "state_vs_control": "state: against {control} with the question alone",
    "state_vs_none": "state: against its own none",
    "full_vs_plain": "full: against {plain}",
    "state_vs_plain": "state: against {plain}",
}


def overview(results: Results, backbone: str) -> Table | None:
    """The memory effect of every adapter but the ablations' on every benchmark, by headline and NLL."""
    effects = _chosen(results.numbers, backbone=backbone, name="memory_effect")
    benchmarks = list(dict.fromkeys(effects["benchmark"]))
    groups = [(name, _shown_metrics(results.headlines[backbone, name])) for name in benchmarks]
    columns = [(name, metric) for name, metrics in groups for metric in metrics]
    filled = fill(effects, results.methods.main, columns, lambda row: (row["benchmark"], row["metric"]))
    if not filled:
        return None
    named = [(name, [heading(metric) for metric in metrics]) for name, metrics in groups]
    return Table(f"Memory effect on {backbone}", "method", named, _rows(results, filled))


def benchmark_tables(results: Results, backbone: str, benchmark: str) -> Iterator[Table]:
    """Everything about one benchmark: scores, effects, comparisons; categories and further metrics folded."""
    metrics = results.headlines[backbone, benchmark]
    numbers = _chosen(results.numbers, backbone=backbone, benchmark=benchmark)
    shown, further = _shown_metrics(metrics), [m for m in metrics[1:] if m != NLL]
    main = numbers[numbers["method"].isin(results.methods.main)]
    variants = numbers[numbers["method"].isin(results.methods.variants)]
    tables = [
        *_conditions(results, main, "Scores", shown),
        *_effects(results, main, shown),
        *_against(results, main, shown),
        *_folded(_conditions(results, main, "Further scores", further)),
        *_folded(_pairs(results, main, metrics[0])),
        *_folded(_categories(results, main, metrics[0])),
        *_folded(_conditions(results, variants, "Ablations: scores", [*shown, *further])),
        *_folded(_effects(results, variants, shown, "Ablations: effects of the memory")),
        *_folded(_against(results, variants, shown, "Ablations: comparisons")),
    ]
    yield from (replace(table, about=f"{benchmark} on {backbone}") for table in tables)


def _folded(tables: Iterator[Table]) -> Iterator[Table]:
    return (replace(table, folded=True) for table in tables)


def _conditions(results: Results, numbers: pd.DataFrame, title: str, metrics: Sequence[str]) -> Iterator[Table]:
    numbers = _chosen(numbers, kind="condition")
    groups = _groups(numbers, metrics)
    columns = [(condition, metric) for metric, conditions in groups for condition in conditions]
    filled = fill(numbers, results.methods.names, columns, lambda row: (row["name"], row["metric"]))
    if filled:
        named = [(_with_direction(metric), conditions) for metric, conditions in groups]
        rows = _rows(results, filled, dict(zip(numbers["method"], numbers["seeds"], strict=True)))
        yield Table(title, "method", named, rows, [_size(numbers)])


def _effects(
    results: Results, numbers: pd.DataFrame, metrics: Sequence[str], title: str = "Effects of the memory"
) -> Iterator[Table]:
    numbers = _chosen(numbers, kind="effect")
    measured = [effect for effect in EFFECTS if (numbers["name"] == effect).any()]
    columns = [(effect, metric) for effect in measured for metric in metrics]
    filled = fill(numbers, results.methods.names, columns, lambda row: (row["name"], row["metric"]))
    if filled:
        groups = [(heading(effect), [heading(metric) for metric in metrics]) for effect in measured]
        yield Table(title, "method", groups, _rows(results, filled))


def _against(
    results: Results, numbers: pd.DataFrame, metrics: Sequence[str], title: str = "Comparisons"
) -> Iterator[Table]:
    """Every method against what it has to beat."""
    numbers = numbers[(numbers["kind"] == "comparison") & numbers["name"].isin(list(QUESTIONS))]
    asked = [question for question in QUESTIONS if (numbers["name"] == question).any()]
    columns = [(question, metric) for question in asked for metric in metrics]
    filled = fill(numbers, results.methods.names, columns, lambda row: (row["name"], row["metric"]))
    if filled:
        others = {"control": results.methods.adaptation_control, "plain": results.methods.plain}
        groups = [(QUESTIONS[asks].format(**others), [heading(m) for m in metrics]) for asks in asked]
        note = "Differences over the same questions; positive is better for the method of the row."
        yield Table(title, "method", groups, _rows(results, filled), [note])


def _pairs(results: Results, numbers: pd.DataFrame, metric: str) -> Iterator[Table]:
    """Method against method, one table per condition; what is below the diagonal mirrors what is above."""
    for condition in ("full", "state"):
        chosen = _chosen(numbers, kind="comparison", name=f"{condition}_pair", metric=metric)
        found: dict[tuple[str, str], TableCell] = {}
        for row in chosen.to_dict("records"):
            found[row["method"], row["against"]] = number(row)
            found[row["against"], row["method"]] = number(_mirrored(row))
        names = [m for m in results.methods.main if any(m in pair for pair in found)]
        if len(names) > 2:
            rows = [Row(one, [found.get((one, other), NOTHING) for other in names]) for one in names]
            title = f"Method against method under {condition}, {heading(metric)}"
            note = "The method of the row minus the method of the column."
            yield Table(title, "method", [("", names)], rows, [note])


def _categories(results: Results, numbers: pd.DataFrame, metric: str) -> Iterator[Table]:
    numbers = _chosen(numbers, kind="category", metric=metric)
    conditions = [name for name in CONDITIONS if (numbers["name"] == name).any()]
    groups = [(category, conditions) for category in dict.fromkeys(numbers["category"])]
    columns = [(category, condition) for category, conditions in groups for condition in conditions]
    filled = fill(numbers, results.methods.names, columns, lambda row: (row["category"], row["name"]))
    if filled:
        rows = _rows(results, filled)
        title = f"{heading(metric)} by category"
        sizes = numbers.drop_duplicates("category").set_index("category")["n"]
        note = "Questions: " + ", ".join(f"{category} {n}" for category, n in sizes.items()) + "."
        yield Table(title, "method", groups, rows, [note])


def _rows(
    results: Results, filled: list[tuple[str, list[TableCell]]], seeds: Mapping[str, str] | None = None
) -> list[Row]:
    def remark(name: str) -> str:
        known = (seeds or {}).get(name, "").split()
        if name not in results.methods.trained or not known:
            return ""
        return f"seed{'s' * (len(known) > 1)} {', '.join(known)}"

    return [Row(name, cells, "frozen" * (name == FROZEN), remark(name)) for name, cells in filled]


def _groups(numbers: pd.DataFrame, metrics: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Metrics, each with the conditions under which it was measured."""
    known = set(zip(numbers["metric"], numbers["name"], strict=True))
    found: list[tuple[str, Sequence[str]]] = [
        (metric, [c for c in CONDITIONS if (metric, c) in known]) for metric in metrics
    ]
    return [(metric, conditions) for metric, conditions in found if conditions]


def _shown_metrics(metrics: Sequence[str]) -> list[str]:
    """The headline and the NLL."""
    return list(dict.fromkeys([metrics[0], *(metric for metric in metrics if metric == NLL)]))


def _with_direction(metric: str) -> str:
    return f"{heading(metric)} ({'lower' if metric == NLL else 'higher'} is better)"


def _size(numbers: pd.DataFrame) -> str:
    most = numbers.loc[numbers["n"].idxmax()]
    return f"{most['n']} questions in {most['clusters']} clusters (documents or conversations)."


def _mirrored(row: Mapping[str, Any]) -> dict[str, Any]:
    opposite = {"better": "worse", "worse": "better"}
    turned = {"value": -row["value"], "low": -row["high"], "high": -row["low"]}
    return {**row, **turned, "verdict": opposite.get(row["verdict"], row["verdict"])}


def _chosen(numbers: pd.DataFrame, **values: str) -> pd.DataFrame:
    for column, value in values.items():
        numbers = numbers[numbers[column] == value]
    return numbers
