"""The training stage: `python -m pipelines.train --config C --backbone NAME --strategy NAME --seed K`.

Starts Ray Train workers that run DeepSpeed ZeRO-2, watches their progress, and writes the adapter folder. An
interrupted run goes on from its last checkpoint; a worker that dies costs at most the steps since then and changes
nothing in the result.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from pipelines.backbones.prepared import backbone_digest
from pipelines.config import Cell, Config, config_hash, load_config
from pipelines.data.shards import read_manifest
from pipelines.errors import StageError, run_stage
from pipelines.registry.trained_cell import training_parameters
from pipelines.run import parts
from pipelines.run.files import alone, replacing, room_to_write, write_record
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance
from pipelines.strategies.kinds import KINDS, recipe_of
from pipelines.training import checkpoint
from pipelines.training.curve import Watcher
from pipelines.training.forecast import Forecast
from pipelines.training.ray_cluster import run_workers, started_ray
from pipelines.training.recipe import Recipe
from pipelines.training.task import WorkerTask
from pipelines.training.trackers import Tracker, make_tracker
from pipelines.training.warm_start import WarmStart

console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="configuration, YAML or resolved JSON")],
    backbone: Annotated[str, typer.Option(help="name of the backbone")],
    strategy: Annotated[str, typer.Option(help="name of the strategy")],
    seed: Annotated[int, typer.Option(help="one of the configuration's seeds")],
) -> None:
    """Trains one backbone × strategy × seed and writes its adapter."""
    train_cell(load_config(config), backbone, strategy, seed)


def train_cell(config: Config, backbone: str, strategy: str, seed: int) -> Path:
    """Train one cell; returns the adapter folder.

    Raises:
        StageError: missing inputs, fewer GPUs or CPUs than asked for, workers that kept failing, or another process
            that trains the same.
    """
    cell, layout = config.cell(backbone, strategy, seed), Layout(config)
    with alone(layout.train_state(backbone, strategy, seed).with_suffix(".lock")):
        return _train(config, cell, layout)


def _train(config: Config, cell: Cell, layout: Layout) -> Path:
    key = backbone, strategy, seed = cell.backbone_name, cell.strategy_name, cell.seed
    recipe = recipe_of(config, cell)
    episodes, notes = recipe.episodes()
    schedule = recipe.schedule(episodes, cell.train.num_workers)
    if too_long := notes.get("prompts_beyond_the_window", {}).get("count"):
        console.print(
            f"{strategy}: the prompts of {too_long} episodes are longer than the backbone's window "
            f"(data.overlong: {config.data.overlong})"
        )
    start = WarmStart.find(recipe, layout.store)
    console.print(f"{_title(cell)}: {Forecast.of(recipe, schedule)}")
    inputs = _inputs(config, cell, start)
    state = layout.train_state(*key).resolve()
    run_folder = state / f"run-{config_hash({**inputs, **notes})[:12]}"
    _drop_other_runs(state, run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with room_to_write(run_folder):
        saved = _run(config, recipe, start, run_folder, schedule.steps)
        record = checkpoint.record(saved)
        record |= {
            "like_one_run": "to the bit" if len(record["workers"]) == 1 else "to rounding",
            "backbone": backbone, "strategy": strategy, "seed": seed, "inputs": inputs,
            "wall_seconds": time.perf_counter() - began,
            "provenance": provenance(parts.train(config, *key)), **notes,
        }  # fmt: skip
    folder = layout.adapter(*key)
    _write_adapter(folder, saved, run_folder, recipe, record)
    shutil.rmtree(state)
    return folder


def _run(config: Config, recipe: Recipe, start: WarmStart | None, run_folder: Path, steps: int) -> Path:
    """Run the workers to the end, and show how far they are; returns the folder of the last checkpoint."""
    cell, layout = recipe.cell, Layout(config)
    key = cell.backbone_name, cell.strategy_name, cell.seed
    task = WorkerTask(
        config.model_copy(update={"results_dir": str(layout.results.resolve())}).to_json(),
        cast(str, KINDS[cell.strategy.kind].recipe),
        *key,
        curve=str(_curve(run_folder)),
        trace=str(layout.trace(*key).resolve()),
        init_adapter=str(start.copy_to(run_folder / "init_adapter")) if start else None,
    )
    with started_ray(cell.train), Watcher(_curve(run_folder), _title(cell), steps, _trackers(config, cell)):
        return run_workers(task, cell.train, run_folder)


def _title(cell: Cell) -> str:
    return f"{cell.strategy_name} on {cell.backbone_name}, seed {cell.seed}"


def _inputs(config: Config, cell: Cell, start: WarmStart | None) -> dict[str, str]:
    """Digests of all that decides the adapter."""
    layout, backbone = Layout(config), cell.backbone_name
    inputs = {
        "config": config_hash(parts.train(config, backbone, cell.strategy_name, cell.seed)),
        "data": config_hash(read_manifest(layout.data(backbone, "train"))["shards"]),
        "backbone": backbone_digest(layout.backbone(backbone)),
    }
    return inputs | ({"init_adapter": start.digest} if start else {})


def _trackers(config: Config, cell: Cell) -> list[Tracker]:
    """Where the curve is sent. A store that can't be used costs the live view, and not the training."""
    key = cell.backbone_name, cell.strategy_name, cell.seed
    folder, settings = Layout(config).tracker(*key), training_parameters(config, *key)
    tracker = make_tracker(cell.train.tracker, _title(cell), settings, folder)
    trackers = [tracker] if tracker else []
    if config.registry.live:
        from pipelines.registry.live import LiveRun  # with MLflow, which takes seconds

        try:
            trackers.append(LiveRun(config, *key))
        except StageError as error:
            console.print(f"this training isn't shown while it runs: {error}")
    return trackers


def _write_adapter(folder: Path, saved: Path, run_folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """The float32 master weights of a checkpoint as an adapter folder."""
    with replacing(folder) as partial:
        recipe.save(partial, checkpoint.master_weights(saved))
        write_record(partial / "training.json", record)
        shutil.copy(_curve(run_folder), partial / "curve.csv")


def _curve(run_folder: Path) -> Path:
    return run_folder / "curve.csv"


def _drop_other_runs(state: Path, keep: Path) -> None:
    """Checkpoints of other settings, data or weights are of no use to this run."""
    for old in state.glob("run-*"):
        if old != keep:
            shutil.rmtree(old)


if __name__ == "__main__":
    run_stage(app)
