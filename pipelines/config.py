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
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pipelines.baselines.settings import (
    Bm25Strategy,
    LlmLingua2Strategy,
    LoraStrategy,
    MemoryBankStrategy,
)
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.config_backbones import Backbone
from pipelines.config_errors import ConfigError, describe
from pipelines.config_files import NAMED_KINDS, merge_named_entries, read_mapping
from pipelines.config_types import Count, GpuShare, Name, Number, Section, unique
from pipelines.delta_layers import THIRDS, adapter_config

FROZEN = "frozen"
"""Name under which the frozen backbone is evaluated, beside the strategies."""


def _deepspeed_settings(value: Any) -> Any:
    return read_mapping(Path(value)) if isinstance(value, str) else value


class DeltaStrategy(Section):
    """A delta-mem adapter: how its memory is written, and what its training changes."""

    trained: ClassVar[bool] = True

    kind: Literal["delta"]
    adapter: dict[str, Any] = Field(
        description="fields of deltamem.DeltaMemConfig; layers may also be first_third, middle_third or last_third"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="keys of the train section that differ here")


def _delta_by_default(value: Any) -> Any:
    return {"kind": "delta", **value} if isinstance(value, Mapping) else value


Strategy = Annotated[
    Annotated[
        DeltaStrategy | LoraStrategy | Bm25Strategy | LlmLingua2Strategy | MemoryBankStrategy,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_delta_by_default),
]


class Generated(Section):
    train_papers: Count = 96
    eval_papers: Count = 24
    facts_per_paper: Count = 6
    seed: int = 0


class Data(Section):
    source: Literal["generated", "files", "hub"]
    train_files: list[str] = Field(default_factory=list, description="QASPER JSON files (source: files)")
    eval_files: list[str] = Field(default_factory=list, description="QASPER JSON files (source: files)")
    hub_id: str = "allenai/qasper"
    hub_revision: str | None = None
    generated: Generated = Field(default_factory=Generated)
    max_written_tokens: Count = 8192
    max_read_tokens: Count = 512
    max_train_questions: Count | None = None
    max_eval_questions: Count | None = None
    overlong: Literal["drop", "truncate"] = Field("drop", description="papers longer than max_written_tokens")
    shard_megabytes: Count = 64
    processes: Count = 2

    @model_validator(mode="after")
    def _files_present(self) -> Data:
        if self.source == "files" and not (self.train_files and self.eval_files):
            raise ValueError("source 'files' needs train_files and eval_files")
        return self


class Train(Section):
    epochs: Count = 1
    max_steps: Count | None = Field(None, description="optimiser steps after which training ends, epochs or not")
    batch_size: Count = Field(32, description="episodes per optimiser step, over all workers")
    micro_batch_size: Count = Field(1, description="episodes per worker and forward pass")
    questions_per_write: Count = Field(1, description="questions of one paper that share one written memory")
    learning_rate: Number = Field(2e-4, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Number = Field(0.1, ge=0, lt=1)
    weight_decay: Number = Field(0.0, ge=0)
    gradient_clipping: Number = Field(1.0, gt=0)
    write_penalty: Number = Field(0.01, ge=0)
    write_target: Number = Field(0.05, ge=0, le=1)
    write_questions: bool = Field(
        False, description="write questions as they are read, as chats do; the paper's recipe only reads them"
    )
    measure_memory_every: Annotated[int, Field(ge=0)] = Field(
        20,
        description="steps between two looks at what the right paper's memory is worth (in the curve; only where a "
        "worker's share of a step is of several papers); 0: never",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile_backbone: bool = Field(
        False, description="compile the backbone's norms and MLPs: less time and memory a step, a slow first one"
    )
    deepspeed: Annotated[
        dict[str, Any],
        BeforeValidator(_deepspeed_settings),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
    ] = Field(
        "configs/deepspeed/zero2.json",
        validate_default=True,
        description="DeepSpeed settings, or the path of a JSON file that holds them",
    )
    precision: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the adapter under DeepSpeed")
    num_workers: Count = 8
    use_gpu: bool = True
    gpus_per_worker: GpuShare = Field(1.0, description="whole GPUs or, for a single worker, a share 1/k of one")
    cpus_per_worker: Count = 1
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint_every: Count = Field(10, description="optimiser steps between checkpoints")
    ray_address: str | None = Field(None, description="address of a Ray cluster; null starts one on this machine")

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> Train:
        if self.use_gpu and self.num_workers > 1 and self.gpus_per_worker < 1:
            raise ValueError(
                f"{self.num_workers} workers with gpus_per_worker {self.gpus_per_worker:g} would share GPUs, "
                "which NCCL refuses; set num_workers: 1 or gpus_per_worker: 1"
            )
        return self


class Evaluate(Section):
    conditions: Annotated[
        list[Literal["none", "state", "swapped", "full"]], Field(min_length=1), AfterValidator(unique)
    ] = ["none", "state", "swapped", "full"]
    batch_size: Count = 8
    max_new_tokens: Count | None = Field(
        None, description="bounds the limits that the benchmarks set on an answer; null leaves them"
    )
    bootstrap_samples: Count = 10000
    seed: int = 0
    use_gpu: bool = True
    gpus: GpuShare = Field(1.0, description="that one evaluation job takes, where use_gpu is true: whole ones or 1/k")


class Register(Section):
    tracking_uri: str | None = Field(None, description="MLflow store; null is sqlite in results_dir")
    experiment: str | None = Field(None, description="MLflow experiment; null is the configuration's name")
    champion_metric: str = Field(
        "qasper/memory_effect_nll", description="BENCHMARK/EFFECT or BENCHMARK/CONDITION/METRIC"
    )
    higher_is_better: bool = True


class Report(Section):
    sample_questions: Annotated[int, Field(ge=0)] = Field(4, description="questions shown with every answer")


class Config(Section):
    """A whole run. ``Config.cell`` gives one training cell with its strategy's overrides applied."""

    name: Name
    results_dir: str = "results"
    backbones: Annotated[dict[Name, Backbone], Field(min_length=1)]
    strategies: Annotated[dict[Name, Strategy], Field(min_length=1)]
    benchmarks: Annotated[dict[Name, BenchmarkSettings], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(unique)] = [42]
    data: Data
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    registry: Register = Field(default_factory=Register, alias="register")
    report: Report = Field(default_factory=Report)

    def cell(self, backbone: str, strategy: str, seed: int) -> Cell:
        """One training cell. Raises ConfigError for a name or seed that this configuration doesn't have."""
        if seed not in self.seeds:
            raise ConfigError(f"seeds: {seed} is not among {self.seeds}")
        chosen = self.entry("strategies", strategy)
        if not chosen.trained:
            raise ConfigError(f"strategies: {strategy!r} ({chosen.kind}) has nothing to train")
        train = Train.model_validate({**self.train.model_dump(), **chosen.train})
        return Cell(backbone, self.entry("backbones", backbone), strategy, chosen, seed, train)

    def entry(self, kind: str, name: str) -> Any:
        """The backbone, strategy or benchmark of that name, or a ConfigError that lists the known ones."""
        known = getattr(self, kind)
        if name not in known:
            raise ConfigError(f"{kind}: {name!r} is not among {', '.join(known)}")
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
    strategy: DeltaStrategy | LoraStrategy
    seed: int
    train: Train


def load_config(path: str | Path) -> Config:
    """Reads a YAML or JSON configuration and resolves it. Raises ConfigError naming key, file and reason."""
    return resolve_config(read_mapping(Path(path)), str(path))


def resolve_config(mapping: Mapping[str, Any], where: str) -> Config:
    """Validates a configuration given as a mapping; ``where`` says in messages where it came from."""
    merged, files = merge_named_entries(mapping, where)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, Config, where, files)) from None
    for name, strategy in config.strategies.items():
        _check_strategy(config, name, strategy, files.get(("strategies", name), where))
    benchmark = config.registry.champion_metric.split("/")[0]
    if benchmark not in config.benchmarks:
        known = ", ".join(config.benchmarks)
        raise ConfigError(f"{where}: register.champion_metric: benchmark {benchmark!r} is not among {known}")
    return config


def _check_strategy(config: Config, name: str, strategy: Strategy, where: str) -> None:
    if name == FROZEN:
        raise ConfigError(f"{where}: strategies.{name}: this name is kept for the frozen backbone; rename it")
    prefix = ("strategies", name)
    try:
        Train.model_validate({**config.train.model_dump(), **strategy.train})
    except ValidationError as error:
        raise ConfigError(describe(error, Train, where, {}, (*prefix, "train"))) from None
    if not isinstance(strategy, DeltaStrategy):
        return
    try:
        adapter_config(strategy.adapter, len(THIRDS))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: strategies.{name}.adapter: {error}") from None


def config_hash(part: Any) -> str:
    """sha256 (hex) of a configuration, a section, or any JSON-like part; the order of keys doesn't count."""
    if isinstance(part, BaseModel):
        part = part.model_dump(mode="json", by_alias=True)
    text = json.dumps(part, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


assert set(NAMED_KINDS) <= set(Config.model_fields)
