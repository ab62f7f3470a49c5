"""What training has to know of each kind of adapter: its episodes, its model and loss, its batches, its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemConfig, adapter_files, get_delta_mem_model
from pipelines.backbone import load_tokenizer, read_record
from pipelines.config import Cell, Config
from pipelines.delta_layers import adapter_config
from pipelines.layout import Layout
from pipelines.shards import open_episodes
from pipelines.training.batches import EpisodeBatch, collate
from pipelines.training.objective import EpisodeLoss, MemoryObjective


class Recipe(ABC):
    """One cell's training, apart from the loop."""

    has_memory = False
    """Whether the objective has a ``memory_effect`` to measure."""

    def __init__(self, config: Config, cell: Cell):
        layout = Layout(config)
        self.config, self.cell = config, cell
        self.folder = layout.backbone(cell.backbone_name)
        self.data = layout.data(cell.backbone_name, "train")

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
        return {"base_model_name_or_path": name, "revision": read_record(self.folder)["revision"]}

    def episodes(self) -> tuple[pa.Table, dict[str, Any]]:
        """The rows to train on, and what the training record has to say about those that aren't."""
        return open_episodes(self.data), {}

    @abstractmethod
    def objective(self, base: PreTrainedModel) -> nn.Module:
        """The loss of a batch as a module whose parameters are exactly the adapter's, named ``adapter.…``."""

    @abstractmethod
    def collate(self, episodes: pa.Table, groups: list[list[int]]) -> EpisodeBatch:
        """Tensors of some groups of rows, for the objective."""

    @abstractmethod
    def metrics(self, result: Any) -> dict[str, Tensor]:
        """Scalars by the names of the curve's columns, from what the objective returned; "loss" is minimised."""

    @abstractmethod
    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the adapter's files from float32 weights named as the objective's, without ``adapter.``."""


class DeltaRecipe(Recipe):
    """A δ-mem adapter: the context is written, the question answered from the memory alone."""

    has_memory = True

    def objective(self, base: PreTrainedModel) -> nn.Module:
        train = self.cell.train
        model = get_delta_mem_model(base, self._settings)
        if train.activation_checkpointing != "none":
            model.gradient_checkpointing_enable(selective=train.activation_checkpointing == "selective")
            model.train()
        return MemoryObjective(model, train.write_penalty, train.write_target, train.write_questions)

    def collate(self, episodes: pa.Table, groups: list[list[int]]) -> EpisodeBatch:
        return collate(episodes, groups, self.tokenizer.pad_token_id)

    def metrics(self, result: EpisodeLoss) -> dict[str, Tensor]:
        return result._asdict()

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        settings = replace(self._settings, **self.origin)
        adapter_files.save_adapter(folder, settings, adapter_files.collect_tensors(tensors, settings))

    @property
    def _settings(self) -> DeltaMemConfig:
        layers = self.backbone_config.get_text_config(decoder=True).num_hidden_layers
        return adapter_config(self.cell.strategy.adapter, layers)


def recipe_of(config: Config, cell: Cell) -> Recipe:
    """The recipe of the cell's kind of strategy."""
    if cell.strategy.kind == "delta":
        return DeltaRecipe(config, cell)
    from pipelines.baselines.lora_recipe import LoraRecipe  # PEFT takes seconds to import

    return LoraRecipe(config, cell)
