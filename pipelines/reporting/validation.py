"""What adapters were worth on held-out questions while they were trained, by source of the data."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

from pipelines.reporting.gather import Results
from pipelines.reporting.tables import NOTHING, Row, Table, TableCell, rounded

QUANTITIES = {"nll": "held-out NLL (nats per token)", "memory_effect": "NLL swapped − state"}
"""What is measured on every source, and how it is called; the second of adapters with a memory only."""

_COLUMN = re.compile(rf"validation/(?P<source>.+)/(?P<quantity>{'|'.join(QUANTITIES)})")


def by_source(curve: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{source: the steps at which it was validated, with a column of each quantity} of a training curve."""
    found: dict[str, dict[str, str]] = {}
    for name in curve.columns:
        if match := _COLUMN.fullmatch(name):
            found.setdefault(match["source"], {})[name] = match["quantity"]
    chosen = {source: curve[["step", *names]].rename(columns=names) for source, names in found.items()}
    return {source: rows.dropna(subset=["nll"]) for source, rows in chosen.items() if rows["nll"].notna().any()}


def validation_table(results: Results, backbone: str) -> Table | None:
    """The last validation of every method on every source: means over seeds, with the lowest and highest of them."""
    last: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for (name, method, _), curve in results.curves.items():
        for source, rows in by_source(curve).items() if name == backbone else ():
            last.setdefault((source, method), []).append(rows.iloc[-1].to_dict())
    if not last:
        return None
    sources = list(dict.fromkeys(source for source, _ in last))
    rows = [
        Row(method, [_cell(last.get((source, method), []), name) for source in sources for name in QUANTITIES])
        for method in results.methods.names
        if any((source, method) in last for source in sources)
    ]
    groups = [(source, list(QUANTITIES.values())) for source in sources]
    return Table("Held-out questions at the end of training", "method", groups, rows, about=backbone)


def _cell(seeds: list[Mapping[str, float]], quantity: str) -> TableCell:
    values = [row[quantity] for row in seeds if not pd.isna(row.get(quantity))]
    if not values:
        return NOTHING
    several = f"seeds {rounded(min(values))} to {rounded(max(values))}" if len(values) > 1 else ""
    return TableCell(rounded(sum(values) / len(values)), seeds=several)
