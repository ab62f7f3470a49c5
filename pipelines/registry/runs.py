"""TODO pipelines/registry/runs.py."""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from pipelines.config import Config, config_hash
from pipelines.pyfunc import ADAPTER_FILES, write_model_folder
from pipelines.registry.store import experiment_id
from pipelines.run import parts
from pipelines.run.files import _read
from pipelines.run.layout import Layout

_BATCH = {"metrics": 1000, "params": 100}


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over the adapter's configuration and weights."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _tags(config: Config, cell: tuple[str, str, int], training: dict[str, Any], digest: str) -> dict[str, str]:
    layout, (backbone, strategy, seed) = Layout(config), cell
    frozen = _read(layout.backbone_record(backbone), "backbone")
    episodes = _read(layout.data_manifest(backbone, "train"), "preprocess")
    code = training["provenance"]["code"]
    tags = {
        "config": config.name,
        "backbone": backbone,
        "backbone_revision": frozen["revision"],
        "backbone_digest": frozen["digest"],
        "strategy": strategy,
        "seed": seed,
        "data_digest": config_hash(episodes["shards"]),
        "adapter_digest": digest,
        "config_hash": config_hash(parts.train(config, *cell)),
        "commit": f"{code['commit'] or 'unknown'}{'+changes' if code['dirty'] else ''}",
    }
    return {name: str(value) for name, value in tags.items()}


def _find_run(client: MlflowClient, experiment: str, tags: dict[str, str]) -> str | None:
    """The finished run of this cell with this adapter; one that broke off is deleted and made anew."""
    wanted = " and ".join(f"tags.{name} = '{tags[name]}'" for name in ("config", "backbone", "strategy", "seed"))
    for run in client.search_runs([experiment], f"{wanted} and tags.adapter_digest = '{tags['adapter_digest']}'"):
        if run.info.status == "FINISHED":
            return run.info.run_id
        client.delete_run(run.info.run_id)
    return None


def _new_run(client: MlflowClient, config: Config, cell: tuple, training: dict[str, Any], tags: dict[str, str]) -> str:
    layout, (backbone, strategy, seed) = Layout(config), cell
    name = f"{backbone}-{strategy}-seed{seed}"
    run_id = client.create_run(experiment_id(client, config), run_name=name, tags=tags).info.run_id
    part = parts.train(config, *cell)
    adapter = dict(part["strategy"])
    adapter |= adapter.pop("adapter", {})  # δ-mem's fields stand in a mapping of their own
    settings = {"seed": seed, **part["train"], **{f"adapter.{k}": v for k, v in adapter.items()}}
    params = [
        Param(key, json.dumps(value) if isinstance(value, dict) else str(value)) for key, value in settings.items()
    ]
    for start in range(0, len(params), _BATCH["params"]):
        client.log_batch(run_id, params=params[start : start + _BATCH["params"]])
    finals = {
        **training["metrics"],
        **{name: training[name] for name in ("wall_seconds", "peak_memory_bytes")},
    }
    _log_metrics(client, run_id, {f"train/{name}": value for name, value in finals.items()})
    _log_curve(client, run_id, layout.curve(*cell))
    client.log_artifact(run_id, str(layout.training_record(*cell)), "training")
    client.log_artifact(run_id, str(layout.curve(*cell)), "training")
    if part["strategy"]["kind"] == "delta":
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write_model_folder(layout.adapter(*cell), layout.backbone(backbone), tags["backbone_digest"], model)
            client.log_artifacts(run_id, str(model), "model")
    else:
        for name in ADAPTER_FILES:
            client.log_artifact(run_id, str(layout.adapter(*cell) / name), "model")
    client.set_terminated(run_id)
    return run_id


def _log_metrics(client: MlflowClient, run_id: str, values: dict[str, float]) -> None:
    """Logs the values that aren't the run's latest already."""
    latest, now = client.get_run(run_id).data.metrics, int(time.time() * 1000)
    new = [Metric(name, value, now, 0) for name, value in values.items() if latest.get(name) != value]
    for start in range(0, len(new), _BATCH["metrics"]):
        client.log_batch(run_id, metrics=new[start : start + _BATCH["metrics"]])


def _log_curve(client: MlflowClient, run_id: str, path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    now = int(time.time() * 1000)
    history = [
        Metric(f"curve/{name}", float(value), now, int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name != "step" and value
    ]
    for start in range(0, len(history), _BATCH["metrics"]):
        client.log_batch(run_id, metrics=history[start : start + _BATCH["metrics"]])


def _version(client: MlflowClient, name: str, record: dict[str, Any], tags: dict[str, str]) -> str:
    """The version of a registered model that holds this run's adapter, made when there is none."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == record["run_id"]:
            return str(version.version)
    made = client.create_model_version(
        name, source=record["source"], run_id=record["run_id"], tags=tags, description=record["description"]
    )
    return str(made.version)
