"""Where the curve's rows are sent as they are made, besides their file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import StageError


class Tracker(Protocol):
    """Takes the values of optimiser steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None:
        """The training has ended, well or not."""


class TensorBoard:
    """Event files in a folder: ``tensorboard --logdir FOLDER``."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, set up by its own environment variables; its files lie in a folder."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        wandb = importlib.import_module("wandb")  # which isn't among this project's packages
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(name=name, config=dict(settings), dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def make_tracker(kind: str, name: str, settings: Mapping[str, Any], folder: Path) -> Tracker | None:
    """The tracker that ``train.tracker`` names; None for "none".

    Args:
        name, settings: of the run.

    Raises:
        StageError: its package isn't installed.
    """
    if kind == "none":
        return None
    try:
        return _TRACKERS[kind](name, settings, folder)
    except ImportError as error:
        raise StageError(f"train.tracker: {kind} isn't installed ({error}); pip install {kind}") from error
