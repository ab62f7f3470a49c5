"""The report's plots, as SVG files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pipelines.report_data import CELL, Results  # noqa: E402

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "svg.hashsalt": "report",  # the same results give the same bytes
}
NO_DATE = {"Date": None}


def write_plots(results: Results, folder: Path) -> dict[str, Path]:
    """Writes every plot; one without data says so. Returns {name: SVG file}."""
    makers: dict[str, Callable[[Results], Figure]] = {
        "memory_effect": lambda r: effect_plot(
            r, "memory_effect", "score(state) − score(swapped), more is better", [0]
        ),
        "context_recovery": lambda r: effect_plot(r, "context_recovery", "share of the full context", [0, 1]),
        "loss": lambda r: curve_plot(r, {"answer_nll": "answer NLL (nats per token)"}),
        "memory": lambda r: curve_plot(r, {"write_gate": "mean write gate", "state_norm": "mean state norm"}),
    }
    paths = {}
    with plt.rc_context(STYLE):
        for name, make in makers.items():
            figure = make(results)
            paths[name] = folder / f"{name}.svg"
            figure.savefig(paths[name], bbox_inches="tight", metadata=NO_DATE)
            plt.close(figure)
    return paths


def effect_plot(results: Results, effect: str, unit: str, lines: list[float]) -> Figure:
    """One panel per benchmark and metric: a dot with its interval for every cell."""
    rows = results.numbers[(results.numbers["name"] == effect) & results.numbers["value"].notna()]
    panels = list(rows.groupby(["benchmark", "metric"], sort=False))
    if not panels:
        return _empty(f"no {effect.replace('_', ' ')} to show")
    height = 0.8 + 0.3 * max(len(group) for _, group in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), height), squeeze=False)
    for axis, ((benchmark, metric), group) in zip(axes[0], panels, strict=True):
        _dots(axis, group)
        for line in lines:
            axis.axvline(line, color="black", linewidth=0.8)
        axis.set_title(f"{benchmark}, {metric.upper()}" if len(metric) < 4 else f"{benchmark}, {metric}")
        axis.set_xlabel(unit)
    figure.tight_layout()
    return figure


def curve_plot(results: Results, columns: dict[str, str]) -> Figure:
    """One panel per quantity (a column of the curve) and backbone, a line per strategy and seed."""
    backbones = list(dict.fromkeys(cell[0] for cell in results.curves))
    if not backbones:
        return _empty("nothing trained yet")
    shape = (len(backbones), len(columns))
    figure, axes = plt.subplots(*shape, figsize=(4.6 * shape[1], 2.8 * shape[0]), squeeze=False)
    for row, backbone in zip(axes, backbones, strict=True):
        for axis, (column, label) in zip(row, columns.items(), strict=True):
            for (name, strategy, seed), curve in results.curves.items():
                if name == backbone:
                    axis.plot(curve["step"], curve[column], label=f"{strategy}, seed {seed}")
            axis.set_title(backbone)
            axis.set_xlabel("optimiser step")
            axis.set_ylabel(label)
            axis.legend(frameon=False)
    figure.tight_layout()
    return figure


def _dots(axis: Axes, group: pd.DataFrame) -> None:
    labels = [f"{row.backbone} {row.strategy} {row.seed}" for row in group[CELL].itertuples()]
    place = np.arange(len(group))[::-1]
    low = (group["value"] - group["low"].fillna(group["value"])).to_numpy(dtype=float)
    high = (group["high"].fillna(group["value"]) - group["value"]).to_numpy(dtype=float)
    axis.errorbar(group["value"], place, xerr=np.stack([low, high]).clip(min=0), fmt="o", capsize=3)
    axis.set_yticks(place, labels)
    axis.set_ylim(-0.6, len(group) - 0.4)


def _empty(text: str) -> Figure:
    figure, axis = plt.subplots(figsize=(4.6, 1.2))
    axis.text(0.5, 0.5, text, ha="center", va="center")
    axis.set_axis_off()
    return figure
