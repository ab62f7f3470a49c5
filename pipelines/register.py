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
from typing import Annotated, Any

import typer
from rich.console import Console

from pipelines.config import Config, load_config
from pipelines.errors import StageError, run_stage
from pipelines.registry.champions import best_of, champion_score, final_metrics
from pipelines.registry.runs import _find_run, _log_metrics, _new_run, _tags, _version, adapter_digest
from pipelines.registry.store import experiment_id, open_store, tracking_uri
from pipelines.run import parts
from pipelines.run.files import _read, _write
from pipelines.run.layout import Layout

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
CHAMPION = "champion"
_DESCRIPTIONS = {
    "delta": None,
    "lora": "A LoRA adapter's files as PEFT writes them, without a pyfunc loader: download them and use "
    "peft.PeftModel.from_pretrained(backbone, FOLDER).",
}


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


def _registrations(config: Config, backbone: str, strategy: str) -> list[Path]:
    layout = Layout(config)
    return [path for seed in config.seeds if (path := layout.registration(backbone, strategy, seed)).exists()]


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
