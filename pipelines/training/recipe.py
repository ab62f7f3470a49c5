"""What training has to know of each kind of adapter: its episodes, its model and loss, its batches, its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.backbones.prepared import load_tokenizer
from pipelines.backbones.record import backbone_record
from pipelines.config import Cell, Config
from pipelines.data.shards import open_episodes
from pipelines.run.layout import Layout
from pipelines.training.batches import EpisodeBatch
from pipelines.training.beside import Beside, Companions
from pipelines.training.schedule import Mixture, Schedule


class Recipe(ABC):
    """One cell's training, apart from the loop."""

    has_memory = False
    """Whether the objective has a ``memory_effect`` to measure."""

    def __init__(self, config: Config, cell: Cell):
        layout = Layout(config)
        self.config, self.cell = config, cell
        self.folder = layout.backbone(cell.backbone_name)
        self.data, self.held_out_data = (layout.data(cell.backbone_name, split) for split in ("train", "eval"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @cached_property
    def backbone_config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.folder, local_files_only=True)

    @property
    def origin(self) -> dict[str, str | None]:
        """The backbone's name and revision, as adapter files give them."""
        name = getattr(self.cell.backbone, "id", self.cell.backbone_name)
        return {"base_model_name_or_path": name, "revision": backbone_record(self.folder)["revision"]}

    def episodes(self) -> tuple[pa.Table, dict[str, Any]]:
        """The rows to train on, and what the training record has to say about those that aren't."""
        return self.usable(open_episodes(self.data))

    def held_out(self) -> pa.Table:
        """The rows to validate on."""
        return self.usable(open_episodes(self.held_out_data))[0]

    def usable(self, episodes: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Episodes as this kind of adapter reads them, without those it can't, and what to record of these."""
        return episodes, {}

    @property
    def sources(self) -> list[str]:
        """The sources of a mixture that are trained on, whose losses are told apart; none where there is no mixture."""
        weights = self.config.data.weights
        return [name for name, weight in weights.items() if weight] if len(weights) > 1 else []

    def schedule(self, episodes: pa.Table, workers: int) -> Schedule:
        """The order in which those rows are trained on. Raises StageError where there can be none."""
        train, seed = self.cell.train, self.cell.seed
        companions = Companions.of(episodes, train, seed) if self.has_memory else None
        return Schedule(episodes, train, seed, workers, Mixture.of(self.config.data), companions, self.has_memory)

    def prepare(self, base: PreTrainedModel, episodes: pa.Table) -> None:  # noqa: B027
        """Makes what the objective needs of the frozen backbone and the episodes: nothing, as a rule."""

    @abstractmethod
    def objective(self, base: PreTrainedModel) -> nn.Module:
        """The loss of a batch as a module whose parameters are exactly the adapter's, named ``adapter.…``.

        It returns a tuple with a ``token_nll``: of each answer token, [A] nats, not to be learnt from.
        """

    @abstractmethod
    def collate(self, episodes: pa.Table, groups: list[list[int]], beside: Beside | None = None) -> EpisodeBatch:
        """Tensors of some groups of rows, and of what they have beside them, for the objective."""

    @abstractmethod
    def metrics(self, result: Any) -> dict[str, Tensor]:
        """Scalars by the names of the curve's columns, from what the objective returned; "loss" is minimised."""

    def measured(self, objective: nn.Module, batches: Iterable[EpisodeBatch]) -> tuple[dict[str, Tensor], Tensor]:
        """What the adapter's files say beside its weights, named as these are: nothing, as a rule.

        They are means over texts; every worker has some of the batches, and so gives sums and the number of texts.
        """
        return {}, torch.zeros(())

    @abstractmethod
    def misfits(self, folder: Path) -> list[str]:
        """In what an adapter differs so that training can't start from it; empty where it can.

        Raises:
            StageError, AdapterFormatError: the folder holds no adapter of this kind, or is damaged.
        """

    @abstractmethod
    def start_from(self, objective: nn.Module, folder: Path) -> None:
        """Gives a new objective the weights of an adapter without :meth:`misfits`."""

    @abstractmethod
    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the adapter's files from float32 weights named as the objective's, without ``adapter.``.

        What was :meth:`measured` is among them.
        """
