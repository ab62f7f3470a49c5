"""The report's plots, as SVG files."""

from __future__ import annotations

from collections.abc import Iterator
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

DECLARED = ("memory_effect", "context_recovery", "loss", "memory")
"""Plots that the workflow expects: one without data says so instead of being left out."""


class Plot(NamedTuple):
    """A plot, what it shows in words, and its file."""

    alt: str
    figure: Figure


def write_plots(config: Config, results: Results, folder: Path) -> dict[str, tuple[str, str]]:
    """Writes every plot for which there is data; returns {name: (words, SVG)} of them.

    Names: those of DECLARED; ``scores-BACKBONE-BENCHMARK`` and ``ablations-BACKBONE-BENCHMARK``,
    ``learning-BACKBONE`` (the test-time learning tasks) and ``cost-BACKBONE``.
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
    yield from _curves(results, "memory", {"write_gate": "mean write gate", "state_norm": "mean state norm"})
    for backbone in config.backbones:
        learning = {}
        for benchmark, settings in config.benchmarks.items():
            if (backbone, benchmark) not in results.headlines:
                continue
            metric = results.headlines[backbone, benchmark][0]
            rows = results.numbers[
                (results.numbers["backbone"] == backbone)
                & (results.numbers["benchmark"] == benchmark)
                & (results.numbers["metric"] == metric)
            ]
            whole = rows[rows["kind"] == "condition"]
            yield from _ablations(results, backbone, benchmark, whole, heading(metric))
            if settings.kind == "test_time_learning":
                learning[f"{benchmark} (n = {whole['n'].max()})"] = whole
                continue
            inside = rows[rows["kind"] == "category"]
            if settings.kind == "facts":
                inside = inside.assign(facts=inside["category"].str.extract(r"(\d+)", expand=False).astype(int))
                figure = charts.lines(inside, "facts", results.methods.main, heading(metric), "facts in a paper")
                yield f"scores-{backbone}-{benchmark}", Plot("Scores by number of facts", figure)
                continue
            parts = inside.groupby("category", sort=False)
            panels = {f"all questions (n = {whole['n'].max()})": whole}
            panels |= {f"{name} (n = {part['n'].max()})": part for name, part in parts}
            figure = charts.bars(panels, results.methods.main, heading(metric))
            yield f"scores-{backbone}-{benchmark}", Plot(f"Scores on {benchmark} by category", figure)
        if learning:
            figure = charts.bars(learning, results.methods.main, "exact match")
            yield f"learning-{backbone}", Plot("Scores on the test-time learning tasks", figure)
        yield from _costs(results, backbone)


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


def _ablations(
    results: Results, backbone: str, benchmark: str, rows: pd.DataFrame, unit: str
) -> Iterator[tuple[str, Plot]]:
    measured = set(rows["method"])
    groups = {
        group: [member for member in members if member[1] in measured]
        for group, members in results.methods.groups().items()
    }
    groups = {group: members for group, members in groups.items() if len(members) > 1}
    if groups:
        figure = charts.settings(groups, rows[rows["name"] != "none"], unit)
        yield f"ablations-{backbone}-{benchmark}", Plot(f"Ablations on {benchmark}", figure)


def _costs(results: Results, backbone: str) -> Iterator[tuple[str, Plot]]:
    costs = rates(results, backbone).rename(columns={"part": "name", "seconds_per_question": "value"})
    if len(costs):
        costs = costs.assign(low=None, high=None)
        panels = dict(iter(costs.groupby("benchmark", sort=False)))
        figure = charts.bars(panels, results.methods.main, "seconds per question")
        yield f"cost-{backbone}", Plot(f"Seconds per question on {backbone}", figure)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path.read_text(encoding="utf-8")
