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

import csv
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from rich.console import Console

from pipelines import parts
from pipelines.champions import best_of, champion_score, final_metrics
from pipelines.config import Config, config_hash, load_config
from pipelines.errors import StageError, run_stage
from pipelines.layout import Layout
from pipelines.model_store import experiment_id, open_store, tracking_uri
from pipelines.pyfunc import ADAPTER_FILES, write_model_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
CHAMPION = "champion"
_DESCRIPTIONS = {
    "delta": None,
    "lora": "A LoRA adapter's files as PEFT writes them, without a pyfunc loader: download them and use "
    "peft.PeftModel.from_pretrained(backbone, FOLDER).",
}
_BATCH = {"metrics": 1000, "params": 100}


def register_cell(config: Config, backbone: str, strategy: str, seed: int) -> dict[str, Any]:
    """Registers one cell and writes its record: {name, version, run_id, source, description, …}.

    Among the rest are what :func:`champion_score` gives. Raises StageError when the cell isn't trained and
    evaluated, or the store can't be used.
    """
    layout, cell = Layout(config), (backbone, strategy, seed)
    folder = layout.adapter(*cell)
    training = _read(layout.training_record(*cell), "train")
    evaluations = {name: _read(layout.evaluation(*cell, name), "evaluate") for name in config.benchmarks}
    scores = final_metrics(evaluations)
    record = {
        "name": f"deltamem-{backbone}-{strategy}",
        "adapter_digest": adapter_digest(folder),
        "description": _DESCRIPTIONS[config.strategies[strategy].kind],
        **champion_score(config, evaluations),
    }
    tags = _tags(config, cell, training, record["adapter_digest"])
    with open_store(config) as client:
        run_id = _find_run(client, experiment_id(client, config), tags)
        if run_id is None:
            run_id = _new_run(client, config, cell, training, tags)
        for tag in tags.items():
            client.set_tag(run_id, *tag)
        _log_metrics(client, run_id, scores)
        for name in config.benchmarks:
            client.log_artifact(run_id, str(layout.evaluation(*cell, name)), "evals")
            client.log_artifact(run_id, str(layout.records(*cell, name)), "evals")
        record["run_id"] = run_id
        record["source"] = f"{client.get_run(run_id).info.artifact_uri}/model"
        record["version"] = _version(client, record["name"], record, tags)
        siblings = [_read(path, "register") for path in _registrations(config, backbone, strategy)]
        others = [sibling for sibling in siblings if sibling["version"] != record["version"]]
        if best := best_of(config, [*others, record]):
            client.set_registered_model_alias(best["name"], CHAMPION, best["version"])
    _write(layout.registration(*cell), record)
    return record


def choose_champion(config: Config, backbone: str) -> dict[str, Any]:
    """Makes the best registered cell of a backbone the champion of ``deltamem-<backbone>``.

    Raises StageError when not one cell has the champion metric.
    """
    layout = Layout(config)
    records = [
        {**_read(layout.registration(*cell), "register"), "strategy": cell[1], "seed": cell[2]}
        for cell in parts.cells(config, backbone)
    ]
    best = best_of(config, records)
    if best is None:
        reasons = "; ".join(f"{r['strategy']}, seed {r['seed']}: {r['no_champion']}" for r in records)
        raise StageError(f"register.champion_metric: no adapter of {backbone} can be champion ({reasons})")
    name = f"deltamem-{backbone}"
    with open_store(config) as client:
        tags = client.get_model_version(best["name"], best["version"]).tags
        version = _version(client, name, best, tags)
        client.set_registered_model_alias(name, CHAMPION, version)
    champion = {**best, "name": name, "version": version, "metric": config.registry.champion_metric}
    _write(layout.champion(backbone), champion)
    return champion


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


def _registrations(config: Config, backbone: str, strategy: str) -> list[Path]:
    layout = Layout(config)
    return [path for seed in config.seeds if (path := layout.registration(backbone, strategy, seed)).exists()]


def _read(path: Path, stage: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(f"{path}: can't be read ({error}). Run `python -m pipelines.{stage}` for it first.") from None


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


ConfigPath = Annotated[Path, typer.Option("--config", help="configuration, resolved or not")]
BackboneName = Annotated[str, typer.Option(help="name of the backbone")]


@app.command()
def cell(
    config: ConfigPath,
    backbone: BackboneName,
    strategy: Annotated[str, typer.Option(help="name of the strategy")],
    seed: Annotated[int, typer.Option(help="seed of the cell")],
) -> None:
    """Registers the adapter of one cell with its evaluations."""
    settings = load_config(config)
    record = register_cell(settings, backbone, strategy, seed)
    console.print(f"{record['name']} version {record['version']} in {tracking_uri(settings)}", soft_wrap=True)
    if record["no_champion"]:
        console.print(f"it can't be champion: {record['no_champion']}", soft_wrap=True)


@app.command()
def champion(config: ConfigPath, backbone: BackboneName) -> None:
    """Makes the best registered adapter of a backbone its champion."""
    chosen = choose_champion(load_config(config), backbone)
    console.print(
        f"{chosen['name']}@{CHAMPION} is {chosen['strategy']}, seed {chosen['seed']} "
        f"({chosen['metric']} = {chosen['score']})",
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_stage(app)
