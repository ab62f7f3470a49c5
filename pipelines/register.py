"""Registers trained and evaluated adapters in MLflow.

    python -m pipelines.register cell --config C --backbone B --strategy S --seed K
    python -m pipelines.register champion --config C --backbone B

Every trained cell, δ-mem or LoRA, has one run (parameters, final metrics, the curve as metric history, tags,
adapter and evaluations as artefacts) and one version of the registered model
``deltamem-<backbone>-<strategy>``; the alias ``champion`` of that model is its best seed. The model
``deltamem-<backbone>`` holds the backbone's best adapter over all strategies, under the alias ``champion`` too.
Best is by ``register.champion_metric``; a cell whose evaluations don't have it (a LoRA has no memory effect)
can't be champion, and its record says so. An adapter that is registered already gets no second version; new
evaluations of it are added to its run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.config import load_config
from pipelines.errors import run_stage
from pipelines.registry.registration import CHAMPION, choose_champion, register_cell
from pipelines.run.layout import Layout

SUMMARY = "Register trained and evaluated adapters in MLflow; the best of a backbone is its champion."
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=SUMMARY)
console = Console()
ConfigPath = Annotated[Path, typer.Option("--config", help="Configuration file.")]
BackboneName = Annotated[str, typer.Option(help="Name of one of its backbones.")]


@app.command()
def cell(
    config: ConfigPath,
    backbone: BackboneName,
    strategy: Annotated[str, typer.Option(help="Name of one of its strategies.")],
    seed: Annotated[int, typer.Option(help="One of its seeds.")],
) -> None:
    """Register the adapter of one cell with its evaluations."""
    settings = load_config(config)
    record = register_cell(settings, backbone, strategy, seed)
    console.print(f"{record['name']} version {record['version']} in {Layout(settings).store}", soft_wrap=True)
    if record["no_champion"]:
        console.print(f"it can't be champion: {record['no_champion']}", soft_wrap=True)


@app.command()
def champion(config: ConfigPath, backbone: BackboneName) -> None:
    """Make the best registered adapter of a backbone its champion."""
    chosen = choose_champion(load_config(config), backbone)
    console.print(
        f"{chosen['name']}@{CHAMPION} is {chosen['strategy']}, seed {chosen['seed']} "
        f"({chosen['metric']} = {chosen['score']})",
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_stage(app)
