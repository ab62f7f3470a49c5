"""What a training will take, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from pipelines.training.recipe import Recipe
from pipelines.training.schedule import Schedule

FLOPS = 2.3e14
"""Useful operations a second of matrix products on an H100: a step of 8,192 + 512 tokens on Qwen3-4B's shape took
0.656 s (RESULTS.md), 0.044 of them by the next."""
TOKEN = 5e-6
"""Seconds that a token takes besides: the 16,700 of a median step on SmolLM2-135M took 0.118 s (docs/remember.md, run
14), of which the products are a third."""
_ADAM_BYTES = 12
"""Of a parameter: its float32 master and Adam's two moments, which ZeRO spreads over the workers."""


def seconds_on_an_h100(parameters: float, tokens: float) -> float:
    """Of training through so many frozen parameters: forward and back are 4 operations a parameter and token."""
    return tokens * (4 * parameters / FLOPS + TOKEN)


@dataclass(frozen=True)
class Forecast:
    """Counts of one training.

    Attributes:
        parameters: of the adapter.
        steps: optimiser steps, of ``contexts`` written contexts each.
        tokens: written and read in all steps, about.
        backbone_bytes, adapter_bytes: memory of each worker for the frozen weights, as they are stored, and for the
            adapter with its gradients and its share of the optimiser; activations come on top.
        hours: of one H100, estimated, not measured here.
    """

    parameters: int
    steps: int
    contexts: int
    tokens: int
    backbone_bytes: int
    adapter_bytes: int
    hours: float

    @classmethod
    def of(cls, recipe: Recipe, schedule: Schedule) -> Forecast:
        train, dtype = recipe.cell.train, getattr(torch, recipe.cell.backbone.dtype)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(recipe.backbone_config, dtype=dtype)
            frozen = sum(p.numel() for p in base.parameters())
            parameters = sum(p.numel() for p in recipe.objective(base).parameters())
        tokens = schedule.tokens
        weights_and_gradients = 2 * (2 if train.precision == "bfloat16" else 4)
        return cls(
            parameters,
            schedule.steps,
            schedule.per_step,
            tokens,
            frozen * dtype.itemsize,
            parameters * (weights_and_gradients + _ADAM_BYTES // train.num_workers),
            seconds_on_an_h100(frozen, tokens) / 3600,
        )

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters; {self.steps:,} steps of {self.contexts} contexts, about {self.tokens:,} "
            f"tokens; {_size(self.backbone_bytes)} of backbone and {_size(self.adapter_bytes)} of adapter and "
            f"optimiser on each worker, besides activations; about {_time(self.hours)} of an H100"
        )


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else "a minute"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
