"""The kinds of chart in the report: bars in panels, dots with intervals, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipelines.config.conditions import CONDITIONS
from pipelines.evaluation.statistics import Estimate

plt.switch_backend("Agg")  # files only, no windows

INK = "#1d2733"
"""Of text and lines; the page replaces it where its background is dark."""
PAPER = "#ffffff"
"""Behind a picture that is looked at by itself, on whatever background; the page has its own."""
_OF_CONDITIONS = ("#8b95a5", "#3b7dd8", "#e08a2e", "#c9a227", "#9b6bb3", "#8fb3d9", "#1d4f8f", "#3f9e6e")
COLOURS = dict(zip(CONDITIONS, _OF_CONDITIONS, strict=True))
"""Of the conditions."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "report",  # the same results give the same bytes
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 7.2  # inches


def bars(panels: Mapping[str, pd.DataFrame], methods: Sequence[str], unit: str) -> Figure:
    """Horizontal bars by method and condition, two panels a row.

    Each panel has rows with method, name (the condition, or another part), value, low and high (None: no
    interval).
    """
    every = pd.concat(panels.values())
    methods = [method for method in methods if method in set(every["method"])]
    present = set(every["name"])
    names = [*(c for c in COLOURS if c in present), *sorted(present - set(COLOURS))]
    figure, axes = _panels(len(panels), 0.75 + len(methods) * (0.1 + 0.11 * len(names)), 0.4, sharex="all")
    thickness = 0.84 / len(names)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for number, name in enumerate(names):
            chosen = rows[rows["name"] == name].set_index("method").reindex(methods)
            place = np.arange(len(methods)) + (number - (len(names) - 1) / 2) * thickness
            axis.barh(place, chosen["value"], thickness * 0.92, color=_colour(name, number), label=name)
            axis.errorbar(chosen["value"], place, xerr=_whiskers(chosen), fmt="none", ecolor=INK, elinewidth=0.7)
        axis.set_title(title)
        axis.tick_params(labelbottom=True)
        axis.set_yticks(np.arange(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
    for axis in axes[-1]:
        axis.set_xlabel(unit)
    _legend(figure, axes)
    return figure


def effects(
    panels: Sequence[tuple[str, pd.DataFrame]], methods: Sequence[str], unit: str, lines: Sequence[float]
) -> Figure:
    """Dots with intervals by method, two panels a row; ``lines`` mark values that mean something."""
    methods = [method for method in methods if any((rows["method"] == method).any() for _, rows in panels)]
    figure, axes = _panels(len(panels), 0.8 + 0.24 * len(methods))
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        chosen = rows.set_index("method").reindex(methods)
        place = np.arange(len(methods))
        axis.errorbar(chosen["value"], place, xerr=_whiskers(chosen), fmt="o", color=COLOURS["state"], capsize=3)
        for line in lines:
            axis.axvline(line, color=INK, linewidth=0.8)
        axis.set_title(title)
        axis.set_yticks(place, methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_xlabel(unit)
        axis.locator_params(axis="x", nbins=5)
    figure.tight_layout()
    return figure


def lines(rows: pd.DataFrame, x: str, methods: Sequence[str], unit: str, x_unit: str) -> Figure:
    """One panel per method: a line with intervals per condition against ``x``, which doubles and may be 0."""
    methods = [method for method in methods if method in set(rows["method"])]
    names = [name for name in COLOURS if name in set(rows["name"])]
    figure, axes = _panels(len(methods), 2.4, 0.4, sharex="all")
    for axis, method in zip(axes.flat, methods, strict=False):
        for name in names:
            chosen = rows[(rows["method"] == method) & (rows["name"] == name)].sort_values(x)
            style = {"fmt": "o-", "markersize": 4, "capsize": 2, "color": COLOURS[name], "label": name}
            axis.errorbar(chosen[x], chosen["value"], yerr=_whiskers(chosen), **style)
        axis.set_xscale("symlog", base=2, linthresh=1)  # logarithmic from 1 on
        axis.set_xticks(sorted(set(rows[x])), sorted(set(rows[x])))
        axis.tick_params(labelbottom=True)
        axis.set_title(method)
    for axis in axes.flat[max(0, len(methods) - 2) : len(methods)]:  # the lowest of each column
        axis.set_xlabel(x_unit)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit)
    _legend(figure, axes)
    return figure


def write_by_layer(estimates: Mapping[int, Estimate], unit: str, path: Path) -> None:
    """An SVG with one bar and its interval per layer, the layers from left to right; grey where it may be nothing."""
    rows = pd.DataFrame([estimate.to_dict() for estimate in estimates.values()])
    place = np.arange(len(rows))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 2.6))
        low, high = (rows[name].astype(float) for name in ("low", "high"))  # None, which tells nothing, becomes NaN
        clear = (low > 0) | (high < 0)
        axis.bar(place, rows["value"], color=np.where(clear, COLOURS["state"], COLOURS["none"]))
        axis.errorbar(place, rows["value"], yerr=_whiskers(rows), fmt="none", ecolor=INK, elinewidth=0.7)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_xticks(place, list(map(str, estimates)), fontsize=7)
        axis.set_xlim(-0.7, len(rows) - 0.3)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("layer")
        axis.set_ylabel(unit)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as an SVG, the same bytes for the same figure, and lets go of it."""
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def settings(groups: Mapping[str, Sequence[tuple[str, str]]], rows: pd.DataFrame, unit: str) -> Figure:
    """One panel per group of ablations: its settings along x, a dot with its interval per condition."""
    figure, axes = _panels(len(groups), 2.5, 0.4)
    names = [name for name in COLOURS if name in set(rows["name"])]
    for axis, (group, members) in zip(axes.flat, groups.items(), strict=False):
        for number, name in enumerate(names):
            chosen = rows[rows["name"] == name].set_index("method").reindex([method for _, method in members])
            place = np.arange(len(members)) + 0.09 * (number - (len(names) - 1) / 2)
            style = {"fmt": "o", "markersize": 4, "capsize": 2, "color": COLOURS[name], "label": name}
            axis.errorbar(place, chosen["value"], yerr=_whiskers(chosen), **style)
        labels = [setting.replace(" ", "\n") for setting, _ in members]
        axis.set_xticks(np.arange(len(members)), labels)
        axis.set_title(group)
        axis.set_xlim(-0.5, len(members) - 0.5)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit)
    _legend(figure, axes)
    return figure


def curves(
    rows: Mapping[str, Mapping[tuple[str, int], pd.DataFrame]], columns: Mapping[str, str], grey: set[str]
) -> Figure:
    """A row per backbone and a panel per quantity; the seeds of a method share its colour.

    ``rows``: {backbone: {(method, seed): curve}}; the methods in ``grey`` are drawn without a name.
    """
    shape = (len(rows), len(columns))
    figure, axes = plt.subplots(*shape, figsize=(WIDTH, 2.9 * shape[0] + 0.4), squeeze=False)
    for line, (backbone, found) in zip(axes, rows.items(), strict=True):
        methods = [name for name in dict.fromkeys(method for method, _ in found) if name not in grey]
        for axis, (column, label) in zip(line, columns.items(), strict=True):
            for (method, _), curve in sorted(found.items(), key=lambda item: item[0][0] not in grey):
                if column not in curve:
                    continue
                drawn = curve[curve[column].notna()]
                named = method not in grey
                colour = f"C{methods.index(method)}" if named else COLOURS["none"]
                known = method in axis.get_legend_handles_labels()[1]
                axis.plot(
                    drawn["step"],
                    drawn[column],
                    marker="o" if len(drawn) == 1 else None,  # a line of one point shows nothing
                    markersize=4,
                    color=colour,
                    alpha=0.9 if named else 0.35,
                    linewidth=1.3 if named else 0.8,
                    label=method if named and not known else None,
                )
            axis.set_title(backbone)
            axis.set_xlabel("optimiser step")
            axis.set_ylabel(label)
    _legend(figure, axes)
    return figure


def empty(text: str) -> Figure:
    figure, axis = plt.subplots(figsize=(WIDTH, 1))
    axis.text(0.5, 0.5, text, ha="center", va="center")
    axis.set_axis_off()
    return figure


def _whiskers(rows: pd.DataFrame) -> NDArray[np.float64]:
    """[2, rows] lengths below and above the value; 0 where there is no interval."""
    value = rows["value"].astype(float)
    low, high = (rows[name].astype(float).fillna(value) for name in ("low", "high"))
    return np.nan_to_num(np.stack([value - low, high - value]).clip(min=0))


def _colour(name: str, number: int) -> str:
    return COLOURS.get(name, f"C{4 + number % 6}")


def _panels(count: int, height: float, more: float = 0.0, **shared: Any) -> tuple[Figure, np.ndarray]:
    """Axes [rows, columns] of ``count`` panels, two a row; each row is ``height`` inches, the legend has ``more``."""
    rows, columns = math.ceil(count / 2), min(2, count)
    size = (WIDTH, height * rows + more)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: np.ndarray) -> None:
    """One legend over all panels, which name the same things."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False)
