"""The paper's tables beside ours. Only where backbone and questions are the paper's do the two compare directly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from pipelines.config import FROZEN, Config
from pipelines.reporting.gather import Results
from pipelines.reporting.paper_columns import OurColumns
from pipelines.reporting.tables import NOTHING, Row, Table, TableCell

MAIN = "The paper's table"
MEAN = "mean"


@cache
def published() -> dict[str, Any]:
    """The paper's numbers, as in ``published.yaml``."""
    return yaml.safe_load(files("pipelines.reporting").joinpath("published.yaml").read_text(encoding="utf-8"))


class SideBySide:
    """Tables whose first block of columns is published and whose others are ours, one per backbone."""

    def __init__(self, config: Config, results: Results) -> None:
        self.paper, self.methods = published(), results.methods
        columns = self.paper["columns"]
        self.ours = [OurColumns(config, results, backbone, columns) for backbone in config.backbones]

    def tables(self) -> Iterator[Table]:
        yield self._main()
        yield self._other_backbones()
        yield self._ablations()
        yield self._state_only()

    def _main(self) -> Table:
        main = self.paper["main"]
        rows = {
            entry["label"]: (entry, self.methods.of_paper.get(name), "full") for name, entry in main["rows"].items()
        }
        return self._table(MAIN, "method", list(self.paper["columns"]), rows, main["notes"])

    def _state_only(self) -> Table:
        rows = {}
        for label, entry in self.paper["state_only"].items():
            method = FROZEN if entry["condition"] == "none" else self.methods.plain
            rows[label] = (entry, method, entry["condition"])
        columns = ["hotpotqa_em", "hotpotqa_f1", "locomo"]
        return self._table("Without any context in the prompt", "condition", columns, rows)

    def _ablations(self) -> Table:
        groups = self.methods.groups()
        ours = {"heads": dict(groups.get("heads", [])), "depth": dict(groups.get("depth", []))}
        rows = {
            f"{group}: {setting}": (entry, ours[group].get(setting), "full")
            for group, settings in self.paper["ablations"].items()
            for setting, entry in settings.items()
        }
        return self._table("Ablations of TSW", "setting", ["hotpotqa_em", "locomo", MEAN], rows)

    def _other_backbones(self) -> Table:
        """Final alone, of the backbones for which the paper gives no more."""
        paper, main = self.paper["other_backbones"], self.paper["main"]["rows"]
        groups, columns = [], []
        for backbone, entry in paper.items():
            ours = next((block for block in self.ours if block.backbone == backbone), None)
            groups.append((entry["name"], ["published", "ours"] if ours else ["published"]))
            columns.append((entry, ours))
        rows = []
        for name in ("frozen", "context2lora", "ssw", "tsw", "msw"):
            cells = []
            for entry, ours in columns:
                cells.append(_published(entry[name]))
                cells += [ours.cell("final", self.methods.of_paper.get(name))] if ours else []
            rows.append(Row(main[name]["label"], cells, "frozen" * (name == FROZEN)))
        folded = not any(ours for _, ours in columns)
        return Table("The paper's other backbones: Final", "method", groups, rows, folded=folded)

    def _table(
        self, title: str, corner: str, columns: list[str], rows: dict[str, Any], notes: Sequence[str] = ()
    ) -> Table:
        """``rows``: {label: (published entry, our method or None, our condition)}."""
        headings = self.paper["columns"] | {MEAN: "mean"}
        groups = [(f"published: {self.paper['main']['name']}", [headings[column] for column in columns])]
        blocks = []
        for block in self.ours:
            cells = {
                label: [block.cell(column, method, condition) for column in columns]
                for label, (_, method, condition) in rows.items()
            }
            kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in cells.values())]
            if kept:
                sizes = [_with_size(headings[columns[i]], block.questions(columns[i])) for i in kept]
                groups.append((f"ours: {block.backbone}", sizes))
                blocks.append((cells, kept))
        shown = []
        for label, (entry, method, _) in rows.items():
            cells = [_published(entry.get(column)) for column in columns]
            for ours, kept in blocks:
                cells += [ours[label][i] for i in kept]
            shown.append(Row(label, cells, "frozen" * (method == FROZEN)))
        return Table(title, corner, groups, shown, list(notes), folded=not blocks and title != MAIN)


def _published(value: float | str | None) -> TableCell:
    if value is None:
        return NOTHING
    return TableCell(value) if isinstance(value, str) else TableCell(f"{value:.2f}")


def _with_size(heading: str, questions: int | None) -> str:
    return heading if questions is None else f"{heading}, n = {questions}"
