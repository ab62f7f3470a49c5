"""Training a δ-mem adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.adapters.names import NORM_LIMIT, without_limits
from deltamem.adapters.tensors import collect_tensors, fill_layers
from deltamem.chat.format import encode_messages
from deltamem.config import SegmentRule
from pipelines.config.adapter import adapter_config
from pipelines.config.strategies import DeltaStrategy
from pipelines.data.shards import read_rows
from pipelines.errors import StageError
from pipelines.training.batches import EpisodeBatch, collate
from pipelines.training.beside import Beside
from pipelines.training.graphs import StepGraphs
from pipelines.training.objective import EpisodeLoss, MemoryObjective
from pipelines.training.recipe import Recipe
from pipelines.training.repetition import Repetition

LIMIT_TO_MEAN = 1.5
"""How large a state may grow, in units of its mean norm after training's texts.

The mean itself is no better after 5,000 tokens, though after 20,000, and costs facts that are unlike training's
(docs/remember.md, after run 14).
"""


class DeltaRecipe(Recipe):
    """A δ-mem adapter: the context is written, the question answered from the memory alone."""

    has_memory = True

    def episodes(self) -> tuple[pa.Table, dict[str, Any]]:
        episodes, notes = super().episodes()
        if self._settings.strategy == "ssw":
            need_segments(episodes, self.cell.backbone_name)
        return episodes, notes

    def usable(self, episodes: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        rule = self._settings.segment_rule
        if self._settings.strategy != "ssw" or rule == "message":  # by messages the episodes are segmented already
            return episodes, {}
        return segmented(episodes, self.tokenizer, rule), {}

    def objective(self, base: PreTrainedModel) -> nn.Module:
        train = self.cell.train
        model = get_delta_mem_model(base, replace(self._settings, limit_norms=False))  # they are found at the end
        if train.activation_checkpointing != "none":
            model.gradient_checkpointing_enable(selective=train.activation_checkpointing == "selective")
            model.train()
        repeat_weight = train.repeat_text.weight if train.repeat_text else 0.0
        objective = MemoryObjective(
            model,
            train.write_penalty,
            train.write_target,
            train.write_questions,
            repeat_weight,
            train.keep_distribution,
            train.lanes,
        )
        if train.cuda_graphs:
            objective.graphs = StepGraphs(objective)
        return objective

    def collate(self, episodes: pa.Table, groups: list[list[int]], beside: Beside | None = None) -> EpisodeBatch:
        repeated = (beside.repeated if beside else None) or []
        repetitions = self._repetition.of(episodes, [groups[place][0] for place in repeated], repeated)
        keep = self.config.data.replies if self.cell.train.keep_distribution else ()
        return collate(episodes, groups, self.tokenizer.pad_token_id, beside, repetitions, keep)

    @cached_property
    def _repetition(self) -> Repetition:
        return Repetition(self.tokenizer)

    def metrics(self, result: EpisodeLoss) -> dict[str, Tensor]:
        return {
            n: value for n, value in result._asdict().items() if n not in ("token_nll", "states") and value is not None
        }

    def measured(self, objective: nn.Module, batches: Iterable[EpisodeBatch]) -> tuple[dict[str, Tensor], Tensor]:
        if not self._settings.limit_norms:
            return super().measured(objective, batches)
        objective = cast(MemoryObjective, objective)
        norms, texts = objective.sum_of_norms(batches)
        limits = LIMIT_TO_MEAN * norms
        return {f"{name}.{NORM_LIMIT}": its for name, its in zip(objective.adapter, limits, strict=True)}, texts

    def misfits(self, folder: Path) -> list[str]:
        found, wanted = (_shape(config, self._depth) for config in (load_adapter(folder)[0], self._settings))
        return [f"its {name} is {found[name]}, the strategy's {wanted[name]}" for name in found
                if found[name] != wanted[name]]  # fmt: skip

    def start_from(self, objective: nn.Module, folder: Path) -> None:
        config, tensors = load_adapter(folder)
        layers = cast(MemoryObjective, objective).model[0].memory_layers
        fill_layers(layers, without_limits(tensors), config, str(folder))

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        settings = replace(self._settings, **self.origin)
        save_adapter(folder, settings, collect_tensors(tensors, settings))

    @property
    def _settings(self) -> DeltaMemConfig:
        return adapter_config(cast(DeltaStrategy, self.cell.strategy).adapter, self._depth)

    @property
    def _depth(self) -> int:
        return self.backbone_config.get_text_config(decoder=True).num_hidden_layers


def _shape(config: DeltaMemConfig, depth: int) -> dict[str, Any]:
    """What decides an adapter's weights; how they are used may change from one training to the next."""
    layers = list(range(depth) if config.layers is None else config.layers)
    return {"rank": config.rank, "num_states": config.num_states, "steer": sorted(config.steer), "layers": layers}


def segmented(episodes: pa.Table, tokenizer: PreTrainedTokenizerBase, rule: SegmentRule) -> pa.Table:
    """Episodes whose contexts are segmented by a rule."""
    papers: list[str] = episodes["paper_id"].to_pylist()
    of_paper: dict[str, np.ndarray] = {}
    for row, paper in enumerate(papers):
        if paper not in of_paper:
            (found,) = read_rows(episodes, [row], ["messages"])
            messages = found["messages"]
            segments = encode_messages(tokenizer, messages, segment=rule).segment_ids if messages else []
            of_paper[paper] = np.array(segments, dtype=np.int32)
    position = episodes.schema.get_field_index("segment_ids")
    field = episodes.schema.field(position)
    return episodes.set_column(position, field, pa.array([of_paper[paper] for paper in papers], field.type))


def need_segments(episodes: pa.Table, backbone: str) -> None:
    """Something of each context would be written by segment; the first few tell what the chat template does.

    Raises:
        StageError: a context has tokens and no segment.
    """
    lengths = pc.call_function("list_value_length", [episodes["segment_ids"]]).to_numpy()
    for row in read_rows(episodes, np.flatnonzero(lengths)[:16].tolist(), ["question_id", "segment_ids"]):
        if max(row["segment_ids"]) < 0:
            raise StageError(
                f"question {row['question_id']}: the chat template of {backbone} changes the texts, so the segments "
                "that ssw writes can't be told apart; train tsw or msw on it, or give it another template"
            )
