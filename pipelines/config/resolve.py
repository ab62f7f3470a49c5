"""The one definition of a run's configuration, validated before any job starts.

A configuration file names its backbones, strategies and benchmarks; resolving it replaces every name by the
contents of ``configs/<kind>/<name>.yaml``, so that a resolved configuration stands on its own. Relative paths
are relative to the folder the command runs in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
)

from pipelines.config.adapter import THIRDS, adapter_config
from pipelines.config.backbones import Backbone
from pipelines.config.benchmarks import BenchmarkSettings
from pipelines.config.data import Data
from pipelines.config.errors import RunConfigError, describe
from pipelines.config.files import NAMED_KINDS, merge_named_entries, read_mapping
from pipelines.config.sections import Evaluate, Register, Report, Train
from pipelines.config.strategies import (
    FROZEN,
    DeltaStrategy,
    LoraStrategy,
    MemGenStrategy,
    MlpMemoryStrategy,
    Strategy,
)
from pipelines.config.types import Name, Section, unique


class Config(Section):
    """A whole run.

    ``Config.cell`` gives one training cell with its strategy's overrides applied.
    """

    name: Name = Field(description="of the run's folder under results_dir")
    results_dir: str = Field("results", description="folder of all runs, and of the MLflow store")
    backbones: Annotated[dict[Name, Backbone], Field(min_length=1)] = Field(description="the frozen models")
    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)] = Field(
        description="what is trained and compared: adapters and baselines"
    )
    benchmarks: Annotated[dict[Name, BenchmarkSettings], Field(min_length=1)] = Field(description="what is asked")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(unique)] = Field(
        [42], description="of the trainings: each strategy is trained once for each"
    )
    data: Data
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    registry: Register = Field(default_factory=Register, alias="register")
    report: Report = Field(default_factory=Report)

    def cell(self, backbone: str, strategy: str, seed: int) -> Cell:
        """One training cell. Raises RunConfigError for a name or seed that this configuration doesn't have."""
        if seed not in self.seeds:
            raise RunConfigError(f"seeds: {seed} is not among {self.seeds}")
        chosen = self.entry("strategies", strategy)
        if not chosen.trained:
            raise RunConfigError(f"strategies: {strategy!r} ({chosen.kind}) has nothing to train")
        frozen = self.entry("backbones", backbone)
        train = Train.model_validate({**self.train.model_dump(), **frozen.train, **chosen.train})
        return Cell(backbone, frozen, strategy, chosen, seed, train)

    def entry(self, kind: str, name: str) -> Any:
        """The backbone, strategy or benchmark of that name, or a RunConfigError that lists the known ones."""
        known = getattr(self, kind)
        if name not in known:
            raise RunConfigError(f"{kind}: {name!r} is not among {', '.join(known)}")
        return known[name]

    def to_json(self) -> str:
        """The resolved configuration as JSON that ``load_config`` reads back to an equal one."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


@dataclass(frozen=True)
class Cell:
    """One backbone × strategy × seed, with the train section as it holds there."""

    backbone_name: str
    backbone: Backbone
    strategy_name: str
    strategy: DeltaStrategy | LoraStrategy | MemGenStrategy | MlpMemoryStrategy
    seed: int
    train: Train


def load_config(path: str | Path) -> Config:
    """Reads a YAML or JSON configuration and resolves it. Raises RunConfigError naming key, file and reason."""
    return resolve_config(read_mapping(Path(path)), str(path))


def resolve_config(mapping: Mapping[str, Any], where: str) -> Config:
    """Validates a configuration given as a mapping; ``where`` says in messages where it came from."""
    merged, files = merge_named_entries(mapping, where)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise RunConfigError(describe(error, Config, where, files)) from None
    for kind in ("backbones", "strategies"):
        for name, entry in getattr(config, kind).items():
            _check_train(config, entry.train, files.get((kind, name), where), (kind, name, "train"))
    for name, strategy in config.strategies.items():
        _check_strategy(config, name, strategy, files.get(("strategies", name), where))
    benchmark = config.registry.champion_metric.split("/")[0]
    if benchmark not in config.benchmarks:
        known = ", ".join(config.benchmarks)
        raise RunConfigError(f"{where}: register.champion_metric: benchmark {benchmark!r} is not among {known}")
    return config


def _check_train(config: Config, changes: Mapping[str, Any], where: str, path: tuple[str, ...]) -> None:
    """Raises RunConfigError where an entry's changes of the train section make none."""
    try:
        Train.model_validate({**config.train.model_dump(), **changes})
    except ValidationError as error:
        raise RunConfigError(describe(error, Train, where, {}, path)) from None


def _check_strategy(config: Config, name: str, strategy: Strategy, where: str) -> None:
    if name == FROZEN:
        raise RunConfigError(f"{where}: strategies.{name}: this name is kept for the frozen backbone; rename it")
    for backbone in config.backbones.values():
        changes = {**backbone.train, **strategy.train}
        _check_train(config, changes, where, ("strategies", name, "train"))
        if strategy.trained and changes.get("cuda_graphs", config.train.cuda_graphs):
            _check_graphs(strategy, f"{where}: strategies.{name}")
        if isinstance(strategy, DeltaStrategy) and changes.get("keep_distribution", config.train.keep_distribution):
            _check_replies(config, f"{where}: strategies.{name}")
    if not isinstance(strategy, DeltaStrategy):
        return
    try:
        adapter_config(strategy.adapter, len(THIRDS))
    except (TypeError, ValueError) as error:
        raise RunConfigError(f"{where}: strategies.{name}.adapter: {error}") from None


def _check_graphs(strategy: Strategy, where: str) -> None:
    """Raises RunConfigError where a strategy's step has no fixed shapes to capture."""
    reason = "only δ-mem adapters have them"
    if isinstance(strategy, DeltaStrategy):
        if strategy.adapter.get("strategy", "tsw") != "ssw":
            return
        reason = "ssw writes as many segments as a batch happens to have, so that its shapes aren't fixed"
    raise RunConfigError(f"{where}: train.cuda_graphs: {reason}; give this strategy train: {{cuda_graphs: false}}")


def _check_replies(config: Config, where: str) -> None:
    """Raises RunConfigError where no source has replies of the frozen backbone's own."""
    if not config.data.replies:
        raise RunConfigError(
            f"{where}: train.keep_distribution keeps how the frozen backbone replies, and no entry of data.sources is "
            "of kind replies; add one (configs/data/replies.yaml), or set it to 0"
        )


def config_hash(part: Any) -> str:
    """sha256 (hex) of a configuration, a section, or any JSON-like part; the order of keys doesn't count."""
    if isinstance(part, BaseModel):
        part = part.model_dump(mode="json", by_alias=True)
    text = json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


assert set(NAMED_KINDS) <= set(Config.model_fields)
