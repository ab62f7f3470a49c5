"""The run of a cell in MLflow, and the versions of registered models that hold its adapter."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipelines.registry.live import drop_live_runs
from pipelines.registry.model_folder import ADAPTER_FILES, write_model_folder
from pipelines.registry.store import made_meanwhile
from pipelines.registry.trained_cell import TrainedCell

_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100  # what MLflow takes in one request


def log_run(client: MlflowClient, experiment: str, cell: TrainedCell, scores: dict[str, float]) -> str:
    """The id of the cell's run, made where there is none, with the evaluations as they are now."""
    run_id = _finished_run(client, experiment, cell) or _new_run(client, experiment, cell)
    for tag in cell.tags.items():
        client.set_tag(run_id, *tag)
    _log_metrics(client, run_id, scores)
    for name in cell.evaluations:
        client.log_artifact(run_id, str(cell.layout.evaluation(*cell.key, name)), "evals")
        client.log_artifact(run_id, str(cell.layout.records(*cell.key, name)), "evals")
    return run_id


def ensure_version(client: MlflowClient, name: str, record: dict[str, Any], tags: dict[str, str]) -> str:
    """The version of a registered model that holds a run's adapter, made when there is none.

    Args:
        record: its run_id, source and description.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        with made_meanwhile():
            client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == record["run_id"]:
            return str(version.version)
    made = client.create_model_version(
        name, source=record["source"], run_id=record["run_id"], tags=tags, description=record["description"]
    )
    return str(made.version)


def _finished_run(client: MlflowClient, experiment: str, cell: TrainedCell) -> str | None:
    """The finished run of this cell with this adapter; one that broke off is deleted and made anew."""
    names = ("config", "backbone", "strategy", "seed", "adapter_digest")
    wanted = " and ".join(f"tags.{name} = '{cell.tags[name]}'" for name in names)
    for run in client.search_runs([experiment], wanted):
        if run.info.status == "FINISHED":
            return run.info.run_id
        client.delete_run(run.info.run_id)
    return None


def _new_run(client: MlflowClient, experiment: str, cell: TrainedCell) -> str:
    drop_live_runs(client, experiment, {name: cell.tags[name] for name in ("config", "backbone", "strategy", "seed")})
    name = f"{cell.backbone}-{cell.strategy}-seed{cell.seed}"
    run_id = client.create_run(experiment, run_name=name, tags=cell.tags).info.run_id
    params = [Param(*setting) for setting in cell.parameters().items()]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])
    _log_metrics(client, run_id, cell.training_metrics())
    now = int(time.time() * 1000)
    _log(client, run_id, [Metric(name, value, now, step) for step, name, value in cell.curve()])
    client.log_artifact(run_id, str(cell.layout.training_record(*cell.key)), "training")
    client.log_artifact(run_id, str(cell.layout.curve(*cell.key)), "training")
    _log_model(client, run_id, cell)
    client.set_terminated(run_id)
    return run_id


def _log_model(client: MlflowClient, run_id: str, cell: TrainedCell) -> None:
    """The adapter's files, where MLflow can load them in a folder that says how."""
    if cell.description is not None:
        for path in (cell.adapter / name for name in ADAPTER_FILES):
            if path.exists():  # not every kind has a card
                client.log_artifact(run_id, str(path), "model")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model_folder(cell.adapter, cell.layout.backbone(cell.backbone), cell.tags["backbone_digest"], model)
        client.log_artifacts(run_id, str(model), "model")


def _log_metrics(client: MlflowClient, run_id: str, values: dict[str, float]) -> None:
    """Logs the values that aren't the run's latest already."""
    latest, now = client.get_run(run_id).data.metrics, int(time.time() * 1000)

    def after_the_last(name: str) -> int:
        """Now, or later where the clock was set back: MLflow shows the value with the latest time."""
        history = client.get_metric_history(run_id, name) if name in latest else []
        return max([now, *(known.timestamp + 1 for known in history)])

    changed = {name: value for name, value in values.items() if latest.get(name) != value}
    _log(client, run_id, [Metric(name, value, after_the_last(name), 0) for name, value in changed.items()])


def _log(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
