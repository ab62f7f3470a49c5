"""The report's plots, as SVG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from pipelines.config import Config
from pipelines.reporting import charts
from pipelines.reporting.costs import rates
from pipelines.reporting.gather import Results
from pipelines.reporting.tables import heading
from pipelines.reporting.validation import QUANTITIES, by_source

DECLARED = ("memory_effect", "context_recovery", "loss", "memory")
"""Plots that the workflow expects: one without data says so instead of being left out."""


class Plot(NamedTuple):
    """A plot, what it shows in words, and its file."""

    alt: str
    figure: Figure


def write_plots(config: Config, results: Results, folder: Path) -> dict[str, tuple[str, str]]:
    """Writes every plot for which there is data; returns {name: (words, SVG)} of them.

    Names: those of DECLARED; ``validation``; ``scores-BACKBONE-BENCHMARK``, ``retention-BACKBONE-BENCHMARK`` and
    ``ablations-BACKBONE-BENCHMARK``, ``learning-BACKBONE`` (the test-time learning tasks) and ``cost-BACKBONE``.
    """
    for old in folder.glob("*.svg"):
        old.unlink()
    made: dict[str, tuple[str, str]] = {}
    with plt.rc_context(charts.STYLE):
        for name, plot in _plots(config, results):
            made[name] = (plot.alt, _save(plot.figure, folder / f"{name}.svg"))
        for name in DECLARED:
            if name not in made:
                _save(charts.empty("nothing to show yet"), folder / f"{name}.svg")
    return made


def _plots(config: Config, results: Results) -> Iterator[tuple[str, Plot]]:
    yield from _effects(results, "memory_effect", "state − swapped, positive is better", [0])
    yield from _effects(results, "context_recovery", "share of the full context", [0, 1])
    losses = {"answer_nll": "answer NLL (nats per token)", "memory_effect": "NLL swapped − state"}
    yield from _curves(results, "loss", losses)
    by_source = {f"answer_nll/{source}": f"answer NLL of {source}" for source in config.data.weights}
    yield from _curves(results, "loss_by_source", by_source)
    yield from _curves(results, "memory", {"write_gate": "mean write gate", "state_norm": "mean state norm"})
    yield from _validation(results)
    for backbone in config.backbones:
        benchmarks = [name for name in config.benchmarks if (backbone, name) in results.headlines]
        for benchmark in benchmarks:
            rows = _headline(results, backbone, benchmark)
            yield from _ablations(results, backbone, benchmark, rows)
            kind = config.benchmarks[benchmark].kind
            if kind in ("facts", "chat_recall") and "category" in set(rows["kind"]):  # one number of facts is no axis
                yield from _by_facts(results, backbone, benchmark, rows)
            elif kind != "test_time_learning":
                yield from _by_category(results, backbone, benchmark, rows)
        tasks = [name for name in benchmarks if config.benchmarks[name].kind == "test_time_learning"]
        yield from _learning(results, backbone, tasks)
        yield from _costs(results, backbone)


def _headline(results: Results, backbone: str, benchmark: str) -> pd.DataFrame:
    """The numbers of a benchmark's headline metric."""
    rows = results.numbers[results.numbers["metric"] == results.headlines[backbone, benchmark][0]]
    return rows[(rows["backbone"] == backbone) & (rows["benchmark"] == benchmark)]


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Of numbers those over all questions."""
    return rows[rows["kind"] == "condition"]


def _by_category(results: Results, backbone: str, benchmark: str, rows: pd.DataFrame) -> Iterator[tuple[str, Plot]]:
    panels = {"all questions": _whole(rows)}
    panels |= dict(iter(rows[rows["kind"] == "category"].groupby("category", sort=False)))
    sized = {f"{name} (n = {part['n'].max()})": part for name, part in panels.items()}
    figure = charts.bars(sized, results.methods.main, _unit(results, backbone, benchmark))
    yield f"scores-{backbone}-{benchmark}", Plot(f"Scores on {benchmark} by category", figure)


def _by_facts(results: Results, backbone: str, benchmark: str, rows: pd.DataFrame) -> Iterator[tuple[str, Plot]]:
    """Against the number of facts and, where there is one, the number of turns since they were told."""
    inside = rows[(rows["kind"] == "category") & rows["method"].isin(results.methods.main)]
    numbers = inside["category"].str.extract(r"(?P<facts>\d+) facts?(?:, (?P<turns>\d+) turns? later)?")
    inside = inside.assign(facts=numbers["facts"].astype(int), turns=numbers["turns"].fillna("0").astype(int))
    unit, soonest = _unit(results, backbone, benchmark), inside["turns"].min()
    figure = charts.lines(inside[inside["turns"] == soonest], "facts", results.methods.main, unit, "facts told")
    yield f"scores-{backbone}-{benchmark}", Plot("Scores by number of facts", figure)
    if inside["turns"].nunique() > 1:
        by_number = inside.assign(method=inside["method"] + inside["facts"].map(", {} told".format))
        panels = list(dict.fromkeys(by_number.sort_values(["facts"], kind="stable")["method"]))
        figure = charts.lines(by_number, "turns", panels, unit, "turns since")
        yield f"retention-{backbone}-{benchmark}", Plot("Scores by number of turns since", figure)


def _learning(results: Results, backbone: str, tasks: Sequence[str]) -> Iterator[tuple[str, Plot]]:
    panels = {task: _whole(_headline(results, backbone, task)) for task in tasks}
    sized = {f"{task} (n = {rows['n'].max()})": rows for task, rows in panels.items()}
    if sized:
        figure = charts.bars(sized, results.methods.main, "exact match")
        yield f"learning-{backbone}", Plot("Scores on the test-time learning tasks", figure)


def _unit(results: Results, backbone: str, benchmark: str) -> str:
    return heading(results.headlines[backbone, benchmark][0])


def _effects(results: Results, effect: str, unit: str, lines: list[float]) -> Iterator[tuple[str, Plot]]:
    numbers = results.numbers
    rows = numbers[(numbers["name"] == effect) & numbers["value"].notna()]
    rows = rows[rows["method"].isin(results.methods.main)]
    panels, several = [], rows["backbone"].nunique() > 1
    for (backbone, benchmark), metrics in results.headlines.items():
        for metric in dict.fromkeys([metrics[0], metrics[-1]]):
            chosen = rows[(rows["backbone"] == backbone) & (rows["benchmark"] == benchmark)]
            chosen = chosen[chosen["metric"] == metric]
            if len(chosen):
                title = f"{benchmark}, {heading(metric)}"
                panels.append((f"{title}\n{backbone}" if several else title, chosen))
    if panels:
        figure = charts.effects(panels, results.methods.main, unit, lines)
        yield effect, Plot(f"{heading(effect).capitalize()} by benchmark and method", figure)


def _curves(results: Results, name: str, columns: dict[str, str]) -> Iterator[tuple[str, Plot]]:
    def known(curve: pd.DataFrame) -> list[str]:
        return [column for column in columns if column in curve and curve[column].notna().any()]

    rows: dict[str, dict[tuple[str, int], pd.DataFrame]] = {}
    for (backbone, method, seed), curve in results.curves.items():
        if known(curve):
            rows.setdefault(backbone, {})[method, seed] = curve
    somewhere = {column for curve in results.curves.values() for column in known(curve)}
    columns = {column: label for column, label in columns.items() if column in somewhere}
    if rows:
        words = " and ".join(columns.values())
        figure = charts.curves(rows, columns, results.methods.variants)
        yield name, Plot(f"{words[0].upper()}{words[1:]} by optimiser step", figure)


def _validation(results: Results) -> Iterator[tuple[str, Plot]]:
    rows: dict[str, dict[tuple[str, int], pd.DataFrame]] = {}
    several = len({backbone for backbone, _, _ in results.curves}) > 1
    for (backbone, method, seed), curve in results.curves.items():
        for source, found in by_source(curve).items():
            rows.setdefault(f"{source} on {backbone}" if several else source, {})[method, seed] = found
    measured = {name for curves in rows.values() for curve in curves.values() for name in curve}
    columns = {name: label for name, label in QUANTITIES.items() if name in measured}
    if rows:
        figure = charts.curves(rows, columns, results.methods.variants)
        yield "validation", Plot("Held-out NLL and memory effect by source and optimiser step", figure)


def _ablations(results: Results, backbone: str, benchmark: str, rows: pd.DataFrame) -> Iterator[tuple[str, Plot]]:
    whole = _whole(rows)
    measured = set(whole["method"])
    groups = {
        group: [member for member in members if member[1] in measured]
        for group, members in results.methods.groups().items()
    }
    groups = {group: members for group, members in groups.items() if len(members) > 1}
    if groups:
        figure = charts.settings(groups, whole[whole["name"] != "none"], _unit(results, backbone, benchmark))
        yield f"ablations-{backbone}-{benchmark}", Plot(f"Ablations on {benchmark}", figure)


def _costs(results: Results, backbone: str) -> Iterator[tuple[str, Plot]]:
    costs = rates(results, backbone).rename(columns={"part": "name", "seconds_per_question": "value"})
    if len(costs):
        costs = costs.assign(low=None, high=None)
        panels = {str(name): rows for name, rows in costs.groupby("benchmark", sort=False)}
        figure = charts.bars(panels, results.methods.main, "seconds per question")
        yield f"cost-{backbone}", Plot(f"Seconds per question on {backbone}", figure)


def _save(figure: Figure, path: Path) -> str:
    charts.save(figure, path)
    return path.read_text(encoding="utf-8")
