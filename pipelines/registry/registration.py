"""Registering a cell, and choosing a backbone's champion among the registered ones."""

from __future__ import annotations

from typing import Any

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.registry.champions import best_of, champion_score, final_metrics
from pipelines.registry.runs import ensure_version, log_run
from pipelines.registry.store import experiment_id, open_store, point_alias
from pipelines.registry.trained_cell import TrainedCell
from pipelines.run import parts
from pipelines.run.files import read_record, run_first, write_record
from pipelines.run.layout import Layout

CHAMPION = "champion"
"""The alias of the best version of a registered model."""


def register_cell(config: Config, backbone: str, strategy: str, seed: int) -> dict[str, Any]:
    """Registers one cell and writes its record: {name, version, run_id, source, description, …}.

    Among the rest are what :func:`champion_score` gives. Raises StageError when the cell isn't trained and
    evaluated, or the store can't be used.
    """
    cell = TrainedCell.read(config, backbone, strategy, seed)
    record = {
        "name": cell.model_name,
        "adapter_digest": cell.tags["adapter_digest"],
        "description": cell.description,
        **champion_score(config, cell.evaluations),
    }
    with open_store(config) as client:
        run_id = log_run(client, experiment_id(client, config), cell, final_metrics(cell.evaluations))
        record["run_id"] = run_id
        record["source"] = f"{client.get_run(run_id).info.artifact_uri}/model"
        record["version"] = ensure_version(client, cell.model_name, record, cell.tags)
        others = [known for known in _registered(config, cell) if known["version"] != record["version"]]
        if best := best_of(config, [*others, record]):
            point_alias(client, best["name"], CHAMPION, best["version"])
    write_record(cell.layout.registration(*cell.key), record)
    return record


def choose_champion(config: Config, backbone: str) -> dict[str, Any]:
    """Makes the best registered cell of a backbone the champion of ``deltamem-<backbone>``; returns its record.

    Raises StageError when not one cell has the champion metric.
    """
    layout = Layout(config)
    records = [
        {**read_record(layout.registration(*key), run_first("register")), "strategy": key[1], "seed": key[2]}
        for key in parts.cells(config, backbone)
    ]
    best = best_of(config, records)
    if best is None:
        reasons = "; ".join(f"{r['strategy']}, seed {r['seed']}: {r['no_champion']}" for r in records)
        raise StageError(f"register.champion_metric: no adapter of {backbone} can be champion ({reasons})")
    name = f"deltamem-{backbone}"
    with open_store(config) as client:
        tags = client.get_model_version(best["name"], best["version"]).tags
        version = ensure_version(client, name, best, tags)
        point_alias(client, name, CHAMPION, version)
    champion = {**best, "name": name, "version": version, "metric": config.registry.champion_metric}
    write_record(layout.champion(backbone), champion)
    return champion


def _registered(config: Config, cell: TrainedCell) -> list[dict[str, Any]]:
    """The records of the cell's strategy under all seeds, of those that are registered."""
    paths = [cell.layout.registration(cell.backbone, cell.strategy, seed) for seed in config.seeds]
    return [read_record(path, run_first("register")) for path in paths if path.exists()]
