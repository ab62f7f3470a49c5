"""Tables as the page and the Markdown file show them: rows of cells under grouped columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

_WIDEST = 8  # columns of a Markdown table, if its groups allow it
HEADINGS = {
    "nll": "NLL",
    "f1": "F1",
    "exact_match": "exact match",
    "memory_effect": "memory effect",
    "context_recovery": "context recovery",
}


class TableCell(NamedTuple):
    """What a table shows in one place: a number, its interval, the seeds' range, a verdict, a remark."""

    text: str = "–"
    interval: str = ""
    seeds: str = ""
    verdict: str = ""
    note: str = ""

    def plain(self) -> str:
        """All of it in one line."""
        return " ".join(part for part in (self.text, self.interval, self.seeds, self.verdict, self.note) if part)


NOTHING = TableCell()


class Row(NamedTuple):
    """``kind`` "frozen" marks the row of the frozen backbone; ``remark`` stands below the label."""

    label: str
    cells: list[TableCell]
    kind: str = ""
    remark: str = ""


@dataclass
class Table:
    """Attributes:
    about: what it is about, where its title alone doesn't tell; the page's headings do.
    title, notes: above and below it.
    corner: heads the labels.
    groups: [(heading, columns)]; one group with an empty heading is a table without groups.
    folded: whether the page shows it on request only.
    """

    title: str
    corner: str
    groups: Sequence[tuple[str, Sequence[str]]]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    folded: bool = False
    about: str = ""


def number(estimate: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> TableCell:
    """An estimate of ``Results.numbers`` as a cell."""
    if pd.isna(estimate["value"]):
        return TableCell("undefined", note=estimate["note"])

    def shown(name: str) -> str:
        return rounded(scale * estimate[name], digits)

    bounded = not pd.isna(estimate["low"])
    several = not pd.isna(estimate["seed_low"])
    return TableCell(
        shown("value"),
        f"[{shown('low')}, {shown('high')}]" if bounded else "",
        f"seeds {shown('seed_low')} to {shown('seed_high')}" if several else "",
        estimate["verdict"],
        estimate["note"],
    )


def rounded(value: float, digits: int = 3) -> str:
    # adding 0 makes a rounded −0 a 0
    return f"{round(value, digits) + 0:.{digits}f}".replace("-", "−")


def fill(
    numbers: pd.DataFrame,
    rows: Sequence[str],
    columns: Sequence[Any],
    key: Callable[[Mapping[str, Any]], Any],
) -> list[tuple[str, list[TableCell]]]:
    """Cells of each method of ``rows`` under ``columns``, into which ``key`` sorts the estimates; rows without
    any are left out."""
    found = {(row["method"], key(row)): number(row) for row in numbers.to_dict("records")}
    filled = [(name, [found.get((name, column), NOTHING) for column in columns]) for name in rows]
    return [(name, cells) for name, cells in filled if cells.count(NOTHING) < len(cells)]


def heading(name: str) -> str:
    """How a metric, a condition or an effect is called."""
    return HEADINGS.get(name, name.replace("_", " ").replace(",", ", "))


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown, which has no grouped columns: a wide table becomes several, of some groups each."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def _markdown(table: Table) -> str:
    paragraphs = [f"### {': '.join(filter(None, (table.about, table.title)))}"]
    start = 0
    for groups in _packed(table.groups):
        width = sum(len(columns) for _, columns in groups)
        rows = [(row, row.cells[start : start + width]) for row in table.rows]
        corner, alone = table.corner, len(groups) == 1
        if alone and groups[0][0]:
            corner = f"{corner} ({groups[0][0]})"
        headings = [name if alone else f"{group}: {name}" for group, names in groups for name in names]
        lines = [_line([corner, *headings]), _line(["---"] * (1 + width))]
        for row, cells in rows:
            if cells.count(NOTHING) < width:
                label = f"{row.label} ({row.remark})" if row.remark else row.label
                lines.append(_line([label, *(cell.plain() for cell in cells)]))
        paragraphs.append("\n".join(lines))
        start += width
    return "\n\n".join([*paragraphs, *table.notes])


def _packed(groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[tuple[str, Sequence[str]]]]:
    """Groups in sequence, as many together as are no wider than a page."""
    packed: list[list[tuple[str, Sequence[str]]]] = []
    room = 0
    for group in groups:
        if len(group[1]) > room:
            packed.append([])
            room = _WIDEST
        packed[-1].append(group)
        room -= len(group[1])
    return packed


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
