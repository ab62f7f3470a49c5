"""The learning rate of each optimiser step."""

from __future__ import annotations

import math

from pipelines.config import Train


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero (or constant), as transformers' schedules count their steps."""
    warmup = math.ceil(train.warmup_ratio * steps)
    if step < warmup:
        return train.learning_rate * step / warmup
    if train.schedule == "constant":
        return train.learning_rate
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
