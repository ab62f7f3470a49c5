"""The training stage: `python -m pipelines.train --config C --backbone NAME --strategy NAME --seed K`.

Starts Ray Train workers that run DeepSpeed ZeRO-2, watches their progress, and writes the adapter folder. An
interrupted run goes on from its last checkpoint; a worker that dies costs at most the steps since then and changes
nothing in the result.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# Ray reads these when it is imported: no usage reports, no second copy of every print, a controller that notices
# reports quickly, and one that never sets GPU-less workers' devices
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # the workers are the work; by default they give way to everything
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402
import typer  # noqa: E402
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402
from rich.console import Console  # noqa: E402

from pipelines.backbones.prepared import backbone_digest  # noqa: E402
from pipelines.config import Cell, Config, config_hash, load_config  # noqa: E402
from pipelines.data.shards import read_manifest  # noqa: E402
from pipelines.errors import StageError, run_stage  # noqa: E402
from pipelines.run import parts  # noqa: E402
from pipelines.run.files import room_to_write  # noqa: E402
from pipelines.run.layout import Layout  # noqa: E402
from pipelines.run.progress import _Watcher  # noqa: E402
from pipelines.run.provenance import provenance  # noqa: E402
from pipelines.strategies.kinds import recipe_of  # noqa: E402
from pipelines.training.batches import Schedule  # noqa: E402
from pipelines.training.deepspeed_engine import STATE_FILE, master_weights  # noqa: E402
from pipelines.training.ray_cluster import _root_cause, _start_ray  # noqa: E402
from pipelines.training.recipe import Recipe  # noqa: E402
from pipelines.training.worker import WorkerTask, train_worker  # noqa: E402

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
        StageError: missing inputs, fewer GPUs or CPUs than asked for, or workers that kept failing.
    """
    cell, layout = config.cell(backbone, strategy, seed), Layout(config)
    train = cell.train
    recipe = recipe_of(config, cell)
    episodes, notes = recipe.episodes()
    schedule = Schedule(episodes, train, seed, train.num_workers)
    if too_long := notes.get("prompts_beyond_the_window", {}).get("count"):
        Console(stderr=True).print(
            f"{strategy}: the prompts of {too_long} episodes are longer than the backbone's window "
            f"(data.overlong: {config.data.overlong})"
        )
    inputs = {
        "config": config_hash(parts.train(config, backbone, strategy, seed)),
        "data": config_hash(read_manifest(layout.data(backbone, "train"))["shards"]),
        "backbone": backbone_digest(layout.backbone(backbone)),
    }
    state = layout.train_state(backbone, strategy, seed).resolve()
    run_folder = state / f"run-{config_hash({**inputs, **notes})[:12]}"
    _drop_other_runs(state, run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    task = WorkerTask(
        str(run_folder / "config.json"),
        str(layout.results.resolve()),
        backbone,
        strategy,
        seed,
        str(run_folder / "curve.csv"),
    )
    began = time.perf_counter()
    with room_to_write(run_folder):
        checkpoint = _run(task, cell, run_folder, schedule.steps)
        record = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        record |= {
            "backbone": backbone, "strategy": strategy, "seed": seed, "inputs": inputs, "workers": train.num_workers,
            "wall_seconds": time.perf_counter() - began,
            "provenance": provenance(parts.train(config, backbone, strategy, seed)), **notes,
        }  # fmt: skip
        folder = layout.adapter(backbone, strategy, seed)
        _write_adapter(folder, checkpoint, run_folder, recipe, record)
    shutil.rmtree(state)
    return folder


def _run(task: WorkerTask, cell: Cell, run_folder: Path, steps: int) -> Path:
    """Run the workers to the end; returns the folder of the last checkpoint."""
    train = cell.train
    _start_ray(cell)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(task),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                **({"GPU": train.gpus_per_worker} if train.use_gpu else {}),
            },  # fmt: skip
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with _Watcher(Path(task.curve), f"{task.strategy} on {task.backbone}, seed {task.seed}", steps):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise StageError(
            f"training {task.strategy} on {task.backbone} (seed {task.seed}) failed more than {train.max_failures} "
            f"times; the last error was: {_root_cause(error)} Checkpoints are kept in {run_folder}: run the same "
            "command again to go on from the last one."
        ) from error
    finally:
        ray.shutdown()
    return Path(result.checkpoint.path)


def _write_adapter(folder: Path, checkpoint: Path, run_folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """The float32 master weights as an adapter folder; it appears whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    recipe.save(partial, master_weights(checkpoint))
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.copy(run_folder / "curve.csv", partial / "curve.csv")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _drop_other_runs(state: Path, keep: Path) -> None:
    """Checkpoints of other settings, data or weights are of no use to this run."""
    for old in state.glob("run-*"):
        if old != keep:
            shutil.rmtree(old)


if __name__ == "__main__":
    run_stage(app)
