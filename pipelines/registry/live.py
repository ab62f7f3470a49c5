"""A training's curve in MLflow while it grows. Registering the adapter puts a run with everything in its place."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipelines.config import Config
from pipelines.registry.store import experiment_id, open_store
from pipelines.registry.trained_cell import training_parameters

LIVE = "live"
"""Tag of a run that tells of a training under way."""


class LiveRun:
    """The run of one cell's training; earlier ones of the cell go.

    Raises:
        StageError: the store can't be used.
    """

    def __init__(self, config: Config, backbone: str, strategy: str, seed: int) -> None:
        cell = {"config": config.name, "backbone": backbone, "strategy": strategy, "seed": str(seed)}
        with open_store(config) as client:
            experiment = experiment_id(client, config)
            drop_live_runs(client, experiment, cell)
            name = f"{backbone}-{strategy}-seed{seed}"
            run = client.create_run(experiment, run_name=name, tags={**cell, LIVE: "true"})
            params = [Param(*setting) for setting in training_parameters(config, backbone, strategy, seed).items()]
            client.log_batch(run.info.run_id, params=params)
        self._client, self.run_id = client, run.info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(f"curve/{name}", value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "FAILED")


def drop_live_runs(client: MlflowClient, experiment: str, cell: Mapping[str, str]) -> None:
    """Deletes the live runs of a cell, told by its tags config, backbone, strategy and seed."""
    wanted = " and ".join(f"tags.{name} = '{value}'" for name, value in {**cell, LIVE: "true"}.items())
    for run in client.search_runs([experiment], wanted):
        client.delete_run(run.info.run_id)
