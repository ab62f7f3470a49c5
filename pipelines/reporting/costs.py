"""What the answers cost: seconds, tokens per second and memory, by method and condition."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from pipelines.config import FROZEN
from pipelines.config.conditions import CONDITIONS
from pipelines.reporting.gather import Results
from pipelines.reporting.tables import NOTHING, Row, Table, TableCell

WRITE = "write"
_GIB = 2**30


def rates(results: Results, backbone: str) -> pd.DataFrame:
    """Means over seeds: benchmark, method, part, seconds per question, tokens per second, GiB at the peak.

    The part "write" makes the memories of state and swapped; it is spread over the questions that it serves.
    Other parts are conditions, or what a baseline does beforehand.
    """
    costs = results.costs[results.costs["backbone"] == backbone]
    costs = costs.assign(
        seconds_per_question=costs["seconds"] / costs["questions"],
        tokens_per_second=costs["tokens"] / costs["seconds"].where(costs["seconds"] > 0),
        gib=costs["peak_bytes"] / _GIB,
    )
    names = ["seconds_per_question", "tokens_per_second", "gib"]
    return costs.groupby(["benchmark", "method", "part"], sort=False)[names].mean().reset_index()


def cost_tables(results: Results, backbone: str) -> Iterator[Table]:
    """A table per benchmark."""
    every = rates(results, backbone)
    for benchmark, found in every.groupby("benchmark", sort=False):
        parts = list(dict.fromkeys(found["part"]))
        timed = [name for name in CONDITIONS if name in parts]
        parts = [*(part for part in parts if part not in CONDITIONS), *timed]
        by_place = {(row["method"], row["part"]): row for row in found.to_dict("records")}
        rows = []
        for method in (name for name in results.methods.names if name in set(found["method"])):
            cells = [_cell(by_place.get((method, part)), "seconds_per_question") for part in parts]
            cells += [_cell(by_place.get((method, part)), "tokens_per_second") for part in timed]
            peak = found[found["method"] == method]["gib"].max()
            rows.append(Row(method, [*cells, TableCell(f"{peak:.2f}")], "frozen" * (method == FROZEN)))
        groups = [("seconds per question", parts), ("tokens per second", timed), ("memory", ["GiB"])]
        yield Table(f"{benchmark} on {backbone}", "method", groups, rows, folded=True, about="Cost")


def training_table(results: Results) -> Table | None:
    """What training each cell took."""
    rows = []
    for (backbone, strategy, seed), record in results.training.items():
        seconds, peak = record["wall_seconds"], record["peak_memory_bytes"] / _GIB
        cells = [
            TableCell(strategy),
            TableCell(str(seed)),
            TableCell(str(record["metrics"]["step"])),
            TableCell(f"{seconds:.0f}"),
        ]
        rows.append(Row(backbone, [*cells, TableCell(f"{peak:.2f}")]))
    columns = ["method", "seed", "steps", "seconds", "peak GiB"]
    return Table("Training", "backbone", [("", columns)], rows, folded=True, about="Cost") if rows else None


def _cell(row: dict | None, name: str) -> TableCell:
    return NOTHING if row is None or pd.isna(row[name]) else TableCell(f"{row[name]:.3g}")
