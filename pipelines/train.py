"""The training stage: `python -m pipelines.train --config C --backbone NAME --strategy NAME --seed K`.

Starts Ray Train workers that run DeepSpeed ZeRO-2, watches their progress, and writes the adapter folder. An
interrupted run goes on from its last checkpoint; a worker that dies costs at most the steps since then and changes
nothing in the result.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from pipelines import environment
from pipelines.backbones.record import backbone_digest
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
from pipelines.training.ray_cluster import run_workers, started_ray
from pipelines.training.task import WorkerTask
from pipelines.training.trackers import Tracker, make_tracker
from pipelines.training.warm_start import WarmStart

if TYPE_CHECKING:
    from pipelines.training.recipe import Recipe

console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Configuration file.")],
    backbone: Annotated[str, typer.Option(help="Name of one of its backbones.")],
    strategy: Annotated[str, typer.Option(help="Name of one of its strategies.")],
    seed: Annotated[int, typer.Option(help="One of its seeds.")],
) -> None:
    """Train one backbone × strategy × seed and write its adapter."""
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
    began = time.perf_counter()
    key = backbone, strategy, seed = cell.backbone_name, cell.strategy_name, cell.seed
    inputs = _inputs(config, cell)
    with ThreadPoolExecutor(1) as meanwhile:
        planned = meanwhile.submit(_plan, config, cell, inputs)  # it loads for as long as Ray needs to start
        with started_ray(cell.train):
            plan = planned.result()
            with room_to_write(plan.run_folder):
                saved = _run(config, plan)
    record = checkpoint.record(saved)
    record |= {
        "like_one_run": "to the bit" if len(record["workers"]) == 1 else "to rounding",
        "backbone": backbone, "strategy": strategy, "seed": seed, "inputs": plan.inputs,
        "wall_seconds": time.perf_counter() - began,
        "provenance": provenance(parts.train(config, *key)), **plan.notes,
    }  # fmt: skip
    folder = layout.adapter(*key)
    _write_adapter(folder, saved, plan, record)
    shutil.rmtree(plan.run_folder.parent)
    return folder


@dataclass(frozen=True)
class Plan:
    """What is known of a training before it starts.

    Attributes:
        start: the adapter that it starts from, None for a new one.
        inputs: digests of all that decides the adapter.
        notes: what the record says of episodes that aren't trained on.
        run_folder: of its checkpoints and its curve.
    """

    recipe: Recipe
    start: WarmStart | None
    steps: int
    inputs: dict[str, str]
    notes: dict[str, Any]
    run_folder: Path


def _plan(config: Config, cell: Cell, inputs: dict[str, str]) -> Plan:
    """Reads the episodes, says what their training will take, and makes room for it."""
    with environment.loading():
        from pipelines.training.forecast import Forecast  # with all that transformers loads to make a model

        layout, recipe = Layout(config), recipe_of(config, cell)
    episodes, notes = recipe.episodes()
    schedule = recipe.schedule(episodes, cell.train.num_workers)
    if too_long := notes.get("prompts_beyond_the_window", {}).get("count"):
        console.print(
            f"{cell.strategy_name}: the prompts of {too_long} episodes are longer than the backbone's window "
            f"(data.overlong: {config.data.overlong})"
        )
    start = WarmStart.find(recipe, layout.store)
    console.print(f"{_title(cell)}: {Forecast.of(recipe, schedule)}")
    inputs = inputs | ({"init_adapter": start.digest} if start else {})
    state = layout.train_state(cell.backbone_name, cell.strategy_name, cell.seed).resolve()
    run_folder = state / f"run-{config_hash({**inputs, **notes})[:12]}"
    _drop_other_runs(state, run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    return Plan(recipe, start, schedule.steps, inputs, notes, run_folder)


def _run(config: Config, plan: Plan) -> Path:
    """Run the workers to the end, and show how far they are; returns the folder of the last checkpoint."""
    cell, layout, start, run_folder = plan.recipe.cell, Layout(config), plan.start, plan.run_folder
    key = cell.backbone_name, cell.strategy_name, cell.seed
    task = WorkerTask(
        config.model_copy(update={"results_dir": str(layout.results.resolve())}).to_json(),
        cast(str, KINDS[cell.strategy.kind].recipe),
        *key,
        curve=str(_curve(run_folder)),
        trace=str(layout.trace(*key).resolve()),
        init_adapter=str(start.copy_to(run_folder / "init_adapter")) if start else None,
    )
    now, later = _tracker(config, cell), partial(_live, config, cell)
    with Watcher(_curve(run_folder), _title(cell), plan.steps, now, later):
        return run_workers(task, cell.train, run_folder)


def _title(cell: Cell) -> str:
    return f"{cell.strategy_name} on {cell.backbone_name}, seed {cell.seed}"


def _inputs(config: Config, cell: Cell) -> dict[str, str]:
    """Digests of what decides the adapter, but for the one that it may start from."""
    layout, backbone = Layout(config), cell.backbone_name
    return {
        "config": config_hash(parts.train(config, backbone, cell.strategy_name, cell.seed)),
        "data": config_hash(read_manifest(layout.data(backbone, "train"))["shards"]),
        "backbone": backbone_digest(layout.backbone(backbone)),
    }


def _tracker(config: Config, cell: Cell) -> Sequence[Tracker]:
    """The one that ``train.tracker`` names, if any."""
    key = cell.backbone_name, cell.strategy_name, cell.seed
    folder, settings = Layout(config).tracker(*key), training_parameters(config, *key)
    tracker = make_tracker(cell.train.tracker, _title(cell), settings, folder)
    return [tracker] if tracker else []


def _live(config: Config, cell: Cell) -> Sequence[Tracker]:
    """The run in MLflow. A store that can't be used costs the live view, and not the training."""
    if not config.registry.live:
        return []
    from pipelines.registry.live import LiveRun  # with MLflow, which takes seconds

    try:
        return [LiveRun(config, cell.backbone_name, cell.strategy_name, cell.seed)]
    except StageError as error:
        console.print(f"this training isn't shown while it runs: {error}")
        return []


def _write_adapter(folder: Path, saved: Path, plan: Plan, record: dict[str, Any]) -> None:
    """The last checkpoint's float32 tensors as an adapter folder."""
    with replacing(folder) as partial:
        plan.recipe.save(partial, checkpoint.adapter_tensors(saved))
        write_record(partial / "training.json", record)
        shutil.copy(_curve(plan.run_folder), partial / "curve.csv")


def _curve(run_folder: Path) -> Path:
    return run_folder / "curve.csv"


def _drop_other_runs(state: Path, keep: Path) -> None:
    """Checkpoints of other settings, data or weights are of no use to this run."""
    for old in state.glob("run-*"):
        if old != keep:
            shutil.rmtree(old)


if __name__ == "__main__":
    run_stage(app)
