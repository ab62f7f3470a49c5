"""Training a LoRA baseline: the same episodes, with the context in the prompt or without any."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltamem.backbone.facts import window
from deltamem.chat.format import encode_messages
from pipelines.benchmarks.base import Question
from pipelines.config.strategies import LoraStrategy
from pipelines.data.shards import whole_chat
from pipelines.errors import StageError
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.strategies.lora import (
    PromptLoss,
    PromptObjective,
    collate_prompts,
    fill,
    fill_from,
    make_lora,
    read_config,
    save_lora,
)
from pipelines.training.batches import EpisodeBatch
from pipelines.training.beside import Beside
from pipelines.training.recipe import Recipe


class LoraRecipe(Recipe):
    """A LoRA; ``overlong`` of the data section also says what happens to prompts longer than the window."""

    @property
    def _lora(self) -> LoraStrategy:
        return cast(LoraStrategy, self.cell.strategy)

    def episodes(self) -> tuple[pa.Table, dict[str, Any]]:
        episodes, notes = super().episodes()
        if notes and not len(episodes):
            raise StageError(
                f"strategies.{self.cell.strategy_name}: no training episode's context and question fit the window "
                f"of {self.cell.backbone_name}, {window(self.backbone_config)} tokens; lower data.max_written_tokens"
            )
        return episodes, notes

    def usable(self, episodes: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if not self._lora.context:
            # batches are made by length, and what isn't read has none
            position = episodes.schema.get_field_index("context_ids")
            none = pa.array([[]] * len(episodes), episodes.schema.field(position).type)
            return episodes.set_column(position, "context_ids", none), {}
        encoder = PromptEncoder(self.tokenizer, None, window(self.backbone_config))
        fitting, count = fit_window(episodes, encoder, self.config.data.overlong)
        return fitting, {"prompts_beyond_the_window": {"count": count, "handled": self.config.data.overlong}}

    def objective(self, base: PreTrainedModel) -> nn.Module:
        model = make_lora(base, self._lora)
        if self.cell.train.activation_checkpointing != "none":
            # what the selective kind keeps is chosen for δ-mem; here both recompute whole layers
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        return PromptObjective(model)

    def collate(self, episodes: pa.Table, groups: list[list[int]], beside: Beside | None = None) -> EpisodeBatch:
        return collate_prompts(episodes, groups, self.tokenizer, self._lora.context)

    def metrics(self, result: PromptLoss) -> dict[str, Tensor]:
        return {"loss": result.loss, "answer_nll": result.loss}

    def misfits(self, folder: Path) -> list[str]:
        found, wanted = read_config(folder), self._lora
        pairs = {
            "rank": (found.r, wanted.rank),
            "target_modules": (sorted(found.target_modules or ()), sorted(wanted.target_modules)),
        }
        return [f"its {name} is {his}, the strategy's {ours}" for name, (his, ours) in pairs.items() if his != ours]

    def start_from(self, objective: nn.Module, folder: Path) -> None:
        fill_from(cast(PromptObjective, objective), folder)

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        config = copy.deepcopy(self.backbone_config)
        config.name_or_path = self.origin["base_model_name_or_path"]  # goes into the model card
        with torch.device("meta"):  # names and shapes are enough: the backbone's weights aren't saved
            model = make_lora(AutoModelForCausalLM.from_config(config), self._lora)
        fill(model, tensors)
        for name, value in self.origin.items():
            setattr(model.peft_config["default"], name, value)
        save_lora(model, folder)


def fit_window(
    episodes: pa.Table, encoder: PromptEncoder, overlong: Literal["drop", "truncate"]
) -> tuple[pa.Table, int]:
    """Episodes whose context, question and answer fit the window as one chat, and how many did not.

    Args:
        overlong: what happens to those: "drop" leaves them out, "truncate" takes the last messages from their context
            (of a single message the last words).
    """
    columns = ("context_ids", "question_ids", "answer_ids")
    # the parts' own templates included, so that only what exceeds the window even so has to be encoded
    bounds = sum(pc.call_function("list_value_length", [episodes[name]]).to_numpy() for name in columns)
    suspects = np.flatnonzero(bounds > encoder.window).tolist()
    rows = dict(zip(suspects, episodes.take(pa.array(suspects, pa.int64())).to_pylist(), strict=True))
    long = {number: row for number, row in rows.items() if _prompt_tokens(row, encoder) > encoder.window}
    if not long:
        return episodes, 0
    if overlong == "drop":
        return episodes.filter(pa.array(number not in long for number in range(len(episodes)))), len(long)
    messages = episodes["messages"].to_pylist()
    for number, row in long.items():
        history = [message for message in row["messages"] if message["role"] != "system"]  # the question has it too
        messages[number], _ = encoder.shorten(history, _question(row), len(row["answer_ids"]), "newest")
    position = episodes.schema.get_field_index("messages")
    field = episodes.schema.field(position)
    return episodes.set_column(position, field, pa.array(messages, field.type)), len(long)


def _prompt_tokens(row: dict[str, Any], encoder: PromptEncoder) -> int:
    prompt = encode_messages(encoder.tokenizer, whole_chat(row), add_generation_prompt=True, segment=None)
    return len(prompt.input_ids) + len(row["answer_ids"])


def _question(row: dict[str, Any]) -> Question:
    return Question(row["question_id"], row["paper_id"], row["prompt"], [row["answer"]])
