"""TODO pipelines/config/sections.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from pipelines.config.files import read_mapping
from pipelines.config.types import Count, GpuShare, Number, Section, unique


def _deepspeed_settings(value: Any) -> Any:
    return read_mapping(Path(value)) if isinstance(value, str) else value


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
