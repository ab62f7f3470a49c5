"""The sections of a configuration that have no files of their own: train, evaluate, register, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from pipelines.config.conditions import ASKED_BY_DEFAULT, CONDITIONS, ConditionName
from pipelines.config.files import read_mapping
from pipelines.config.further_losses import CarryMemory, Contrast, RepeatText, WriteAfter
from pipelines.config.types import Count, GpuShare, Number, Section, unique


def _deepspeed_settings(value: Any) -> Any:
    return read_mapping(Path(value)) if isinstance(value, str) else value


class Train(Section):
    """How adapters are trained; the defaults are the paper's recipe. A strategy may set keys of its own."""

    epochs: Count = Field(1, description="passes over the episodes")
    max_steps: Count | None = Field(None, description="optimiser steps after which training ends, epochs or not")
    batch_size: Count = Field(32, description="episodes per optimiser step, over all workers")
    micro_batch_size: Count = Field(1, description="episodes per worker and forward pass")
    questions_per_write: Count = Field(1, description="questions of one paper that share one written memory")
    learning_rate: Number = Field(2e-4, gt=0, description="of AdamW, after the warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: falling to zero, or staying"
    )
    warmup_ratio: Number = Field(0.1, ge=0, lt=1, description="share of the steps over which the rate rises from zero")
    weight_decay: Number = Field(0.0, ge=0, description="of AdamW")
    init_adapter: str | None = Field(
        None,
        description="adapter to start from: a folder, a Hub id or models:/NAME@ALIAS; null: a new one. Its kind, rank, "
        "states and steered heads must be those of the strategy",
    )
    gradient_clipping: Number = Field(1.0, gt=0, description="norm to which a step's gradient is cut")
    write_penalty: Number = Field(
        0.01, ge=0, description="weight w of the penalty w · mean over layers of (mean write gate − write_target)²"
    )
    write_target: Number = Field(0.05, ge=0, le=1, description="write gate that the penalty draws to")
    write_questions: bool = Field(
        False, description="write questions as they are read, as chats do; the paper's recipe only reads them"
    )
    contrast: Contrast | None = Field(None, description="null: without")
    repeat_text: RepeatText | None = Field(None, description="null: without")
    write_after: WriteAfter | None = Field(None, description="null: questions follow right on their text")
    carry_memory: CarryMemory | None = Field(None, description="null: every text is written into an empty memory")
    keep_distribution: Number = Field(
        0.0,
        ge=0,
        description="weight of KL(frozen ‖ adapted), per token, on the replies of data sources of kind replies, beside "
        "their NLL: so the frozen backbone's distribution after the same visible prompt is kept, and not only its "
        "likeliest words. One more pass over steps with such replies; δ-mem adapters only",
    )
    measure_memory_every: Annotated[int, Field(ge=0)] = Field(
        20,
        description="steps between two looks at what the right paper's memory is worth (in the curve; only where a "
        "worker's share of a step is of several papers); 0: never",
    )
    validate_every: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps between two validations on held-out episodes, by source, in the curve; 0: never. It changes "
        "nothing of the adapter, and trains none again",
    )
    validation_questions: Count = Field(64, description="questions of each source in a validation, at most")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes again to save memory: nothing, all but matrix products and "
        "attention, or everything",
    )
    compile_backbone: bool | Literal["layers"] = Field(
        False,
        description="compile the backbone's norms and MLPs: less time and memory a step, a slow first one; `layers`: "
        "whole layers with their memory (tsw and msw, without activation checkpointing): a small backbone's steps "
        "take a quarter less time again, after a first one of about a minute",
    )
    cuda_graphs: bool = Field(
        False,
        description="run a step's passes as CUDA graphs, padded to a few shapes, each captured when it first comes: "
        "several times faster where issuing a small backbone's kernels takes longer than running them; tsw and msw on "
        "a GPU, without activation checkpointing",
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
    num_workers: Count = Field(
        8,
        description="training processes, each with GPUs of its own where use_gpu is true; a training goes on from its "
        "checkpoint with another number, and a finished one isn't trained again for it",
    )
    use_gpu: bool = Field(True, description="train on GPUs; without one the stage says so and ends")
    gpus_per_worker: GpuShare = Field(1.0, description="whole GPUs or, for a single worker, a share 1/k of one")
    cpus_per_worker: Count = Field(1, description="CPUs that a worker takes of the scheduler's")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="failures after which a training ends; each before goes on from the last checkpoint"
    )
    checkpoint_every: Count = Field(10, description="optimiser steps between checkpoints")
    profile_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps, after two to warm up, of which the first worker writes a profiler's trace to profiles/"
    )
    tracker: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="where the curve is sent as it grows, besides MLflow; its package has to be installed"
    )
    ray_address: str | None = Field(
        None,
        description="address of a Ray cluster, on which evaluations run too; null starts one on this machine for each "
        "training",
    )

    @property
    def lanes(self) -> int:
        """Memories that may go on from step to step: for each micro-batch as many as a step has texts."""
        texts, micro = (max(1, size // self.questions_per_write) for size in (self.batch_size, self.micro_batch_size))
        return texts * (texts // micro) if self.carry_memory else 0

    @model_validator(mode="after")
    def _graphs_can_be_captured(self) -> Train:
        if self.cuda_graphs and not self.use_gpu:
            raise ValueError("cuda_graphs needs a GPU, and use_gpu is false; set one of them the other way")
        if self.cuda_graphs and self.activation_checkpointing != "none":
            raise ValueError(
                "cuda_graphs can't be captured with activation_checkpointing, which looks at the random state; set "
                "activation_checkpointing: none, or cuda_graphs: false"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_carried_past_a_checkpoint(self) -> Train:
        if self.carry_memory and self.checkpoint_every % self.carry_memory.anew_every:
            raise ValueError(
                f"checkpoint_every, {self.checkpoint_every}, is no multiple of carry_memory.anew_every, "
                f"{self.carry_memory.anew_every}, and no checkpoint holds the memories that go on from step to step; "
                "make it one"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_gpus_of_their_own(self) -> Train:
        if self.use_gpu and self.num_workers > 1 and self.gpus_per_worker < 1:
            raise ValueError(
                f"{self.num_workers} workers with gpus_per_worker {self.gpus_per_worker:g} would share GPUs, "
                "which NCCL refuses; set num_workers: 1 or gpus_per_worker: 1"
            )
        return self


class Evaluate(Section):
    """How adapters, baselines and the frozen backbone are evaluated."""

    conditions: Annotated[list[ConditionName], Field(min_length=1), AfterValidator(unique)] = Field(
        ASKED_BY_DEFAULT,
        description="; ".join(f"{name}: {told.prompt}, memory {told.memory}" for name, told in CONDITIONS.items()),
    )
    batch_size: Count = Field(8, description="questions answered side by side, at most")
    max_new_tokens: Count | None = Field(
        None, description="bounds the limits that the benchmarks set on an answer; null leaves them"
    )
    write_tokens: Count | None = Field(
        None,
        description="tokens of a history that are written into a memory in one pass, at most; null: the backbone's "
        "window. What learnt from short texts holds long histories better in pieces like them (docs/remember.md)",
    )
    bootstrap_samples: Count = Field(10000, description="samples behind each 95 % interval")
    seed: int = Field(0, description="of the bootstrap")
    use_gpu: bool = Field(True, description="evaluate on a GPU; without one the stage says so and ends")
    gpus: GpuShare = Field(1.0, description="that one evaluation job takes, where use_gpu is true: whole ones or 1/k")


class Register(Section):
    """Where runs and models are recorded, and which of them is the champion."""

    tracking_uri: str | None = Field(None, description="MLflow store; null is sqlite in results_dir")
    experiment: str | None = Field(None, description="MLflow experiment; null is the configuration's name")
    live: bool = Field(
        True, description="show training curves in MLflow while they grow, and not only once adapters are registered"
    )
    champion_metric: str = Field(
        "qasper/memory_effect_nll", description="BENCHMARK/EFFECT or BENCHMARK/CONDITION/METRIC"
    )
    higher_is_better: bool = Field(True, description="whether the champion is the cell with the highest value")


class Report(Section):
    """What the report shows."""

    sample_questions: Annotated[int, Field(ge=0)] = Field(4, description="questions shown with every answer")
