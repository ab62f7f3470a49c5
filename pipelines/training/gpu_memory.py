"""A training that doesn't fit on its GPU says what to change; trying again would end the same way."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from pipelines.errors import StageError


@contextmanager
def room_on_gpu() -> Generator[None]:
    """Turns a GPU's full memory into a `StageError` that says what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = str(error).partition(" If reserved")[0]
        raise StageError(
            f"{asked} Lower train.micro_batch_size, which changes the steps only by rounding; with train.cuda_graphs "
            "every shape of a micro-batch takes memory of its own, and train.carry_memory adds shapes. If something "
            "else is on that GPU, run the same command again without it."
        ) from error
