"""What a training worker is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from pipelines.config import resolve_config

if TYPE_CHECKING:
    from pipelines.training.recipe import Recipe


@dataclass(frozen=True)
class WorkerTask:
    """One cell's training; paths are absolute, because a worker's folder is elsewhere.

    Attributes:
        config: the resolved configuration as JSON.
        recipe: "module:name" of the cell's recipe.
        backbone, strategy, seed: the cell.
        curve: file of the training curve.
        trace: file of the profiler's trace, if there is to be one.
        init_adapter: folder of the adapter to start from, None for a new one.
    """

    config: str
    recipe: str
    backbone: str
    strategy: str
    seed: int
    curve: str
    trace: str
    init_adapter: str | None = None

    def make_recipe(self) -> Recipe:
        config = resolve_config(json.loads(self.config), "the training stage's configuration")
        return resolve_name(self.recipe)(config, config.cell(self.backbone, self.strategy, self.seed))
