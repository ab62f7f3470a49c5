"""A trained and evaluated cell as its files tell it: all that its run in MLflow is made of."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from pipelines.config import Config, config_hash
from pipelines.errors import StageError
from pipelines.run import parts
from pipelines.run.files import read_record, run_first
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import KINDS


@dataclass(frozen=True)
class TrainedCell:
    """One backbone × strategy × seed with its records.

    Attributes:
        training: the training's record.
        evaluations: {benchmark: result}, all of the configuration's.
        tags: by which its run and its versions are found and told apart.
    """

    config: Config
    backbone: str
    strategy: str
    seed: int
    training: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    tags: dict[str, str]

    @classmethod
    def read(cls, config: Config, backbone: str, strategy: str, seed: int) -> TrainedCell:
        """Raises StageError when the cell isn't trained and evaluated, or its adapter isn't all numbers."""
        layout, key = Layout(config), (backbone, strategy, seed)
        training = read_record(layout.training_record(*key), run_first("train"))
        evaluations = {
            name: read_record(layout.evaluation(*key, name), run_first("evaluate")) for name in config.benchmarks
        }
        _check_finite(layout.adapter_weights(*key))
        return cls(config, *key, training, evaluations, _tags(config, key, training))

    @property
    def key(self) -> tuple[str, str, int]:
        return self.backbone, self.strategy, self.seed

    @property
    def layout(self) -> Layout:
        return Layout(self.config)

    @property
    def description(self) -> str | None:
        """How to use its registered model; None where MLflow can load it."""
        return KINDS[self.config.strategies[self.strategy].kind].description

    @property
    def adapter(self) -> Path:
        return self.layout.adapter(*self.key)

    @property
    def model_name(self) -> str:
        """Of the registered model whose versions are this cell's adapter and its other seeds'."""
        return f"deltamem-{self.backbone}-{self.strategy}"

    def parameters(self) -> dict[str, str]:
        """The settings of its training."""
        return training_parameters(self.config, *self.key)

    def training_metrics(self) -> dict[str, float]:
        """What the training ended with."""
        cost = {name: self.training[name] for name in ("wall_seconds", "peak_memory_bytes")}
        return {f"train/{name}": value for name, value in (self.training["metrics"] | cost).items()}

    def curve(self) -> Iterator[tuple[int, str, float]]:
        """(step, metric, value) of the training curve."""
        with self.layout.curve(*self.key).open(newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                yield from ((step, f"curve/{name}", float(value)) for name, value in row.items() if value)


def training_parameters(config: Config, backbone: str, strategy: str, seed: int) -> dict[str, str]:
    """The settings of a cell's training as texts, those of its adapter under ``adapter.``."""
    part = parts.train(config, backbone, strategy, seed)
    adapter = dict(part["strategy"])
    adapter |= adapter.pop("adapter", {})  # δ-mem's fields stand in a mapping of their own
    settings = {"seed": seed, **part["train"], **{f"adapter.{key}": value for key, value in adapter.items()}}
    return {key: json.dumps(value) if isinstance(value, dict) else str(value) for key, value in settings.items()}


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over the adapter's configuration and weights."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _check_finite(weights: Path) -> None:
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{weights}: can't be read ({error}). Remove its folder and train it again.") from None
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise StageError(
            f"{weights}: {len(broken)} of {len(tensors)} tensors hold values that are no numbers (first: {broken[0]}), "
            "so this adapter isn't registered. Its training diverged: lower train.learning_rate, remove its folder and "
            "train it again."
        )


def _tags(config: Config, key: tuple[str, str, int], training: dict[str, Any]) -> dict[str, str]:
    layout, (backbone, strategy, seed) = Layout(config), key
    frozen = read_record(layout.backbone_record(backbone), run_first("backbone"))
    episodes = read_record(layout.data_manifest(backbone, "train"), run_first("preprocess"))
    code = training["provenance"]["code"]
    tags = {
        "config": config.name,
        "backbone": backbone,
        "backbone_revision": frozen["revision"],
        "backbone_digest": frozen["digest"],
        "strategy": strategy,
        "seed": seed,
        "data_digest": config_hash(episodes["shards"]),
        "adapter_digest": adapter_digest(layout.adapter(*key)),
        "config_hash": config_hash(parts.train(config, *key)),
        "commit": f"{code['commit'] or 'unknown'}{'+changes' if code['dirty'] else ''}",
    }
    if start := training.get("inputs", {}).get("init_adapter"):
        tags["init_adapter"] = start
    return {name: str(value) for name, value in tags.items()}
