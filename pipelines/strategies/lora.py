"""LoRA adapters (PEFT) trained on the episodes of the δ-mem adapters: with and without the context.

Context2LoRA reads the context in its prompt and learns to answer from it. The same LoRA trained on the
questions alone is the control for adaptation: it can learn what answers look like, and nothing about any
document.

On Qwen3-4B (36 layers, hidden 2,560, 4,096 query and 1,024 key/value channels) rank 8 on the query, key,
value and output projections has 36 · 8 · ((2560 + 4096) + 2 · (2560 + 1024) + (4096 + 2560)) = 5,898,240
parameters: the 5.9 million that the paper gives. So these four are the default, although the paper doesn't
name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem.backbone.no_cache import NoCache
from deltamem.chat.format import encode_messages
from pipelines.config.strategies import LoraStrategy
from pipelines.data.shards import read_rows, whole_chat
from pipelines.errors import StageError
from pipelines.training.batches import EpisodeBatch, collate
from pipelines.training.losses import answer_logits, answer_nll, token_nll

WEIGHTS = "adapter_model.safetensors"


def make_lora(base: PreTrainedModel, settings: LoraStrategy, dropout: float = 0.0) -> PeftModel:
    """A new LoRA on a frozen backbone: float32 weights, the second factor zero, so that it changes nothing
    yet.

    Raises:
        StageError: the backbone has no module of a name in ``target_modules``.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=dropout,
        target_modules=settings.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise StageError(
            f"LoRA: {error} Name projections of this backbone in the strategy's target_modules."
        ) from error
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def save_lora(model: PeftModel, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them."""
    config: Any = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set; equal adapters are to have equal files
    # embeddings aren't trained; to find that out PEFT would look for the backbone on the Hub
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_lora(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A saved LoRA on its backbone, for inference.

    Raises:
        StageError: the folder isn't one that :func:`save_lora` wrote, or is damaged.
    """
    _require_files(folder)
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=False).eval()
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise StageError(
            f"{folder}: this LoRA adapter doesn't fit the backbone ({error}). Remove it and train it again."
        ) from error


def read_config(folder: Path) -> LoraConfig:
    """The settings of a saved LoRA. Raises StageError where there is none."""
    _require_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise StageError(f"{folder}: its adapter_config.json is none of PEFT's ({error})") from error
    if not isinstance(config, LoraConfig):
        raise StageError(f"{folder}: no LoRA, but PEFT's {config.peft_type.value}")
    return config


def fill_from(objective: PromptObjective, folder: Path) -> None:
    """Gives an objective's LoRA the weights of a saved one of the same shape."""
    (model,) = objective.model
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def _require_files(folder: Path) -> None:
    for name in ("adapter_config.json", WEIGHTS):  # without the latter PEFT would look for a pickle
        if not (folder / name).is_file():
            raise StageError(f"{folder}: no LoRA adapter ({name} is missing). Train this strategy first.")


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """{name in the model: parameter} of the LoRA."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Makes tensors, named as :class:`PromptObjective` names its parameters, the LoRA's weights.

    They take the place of the model's own, which may be on the meta device.
    """
    model.load_state_dict({name: tensors[_flat(name)] for name in trainable(model)}, strict=False, assign=True)


def size(model: PeftModel) -> int:
    """Parameters of the LoRA."""
    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())


class PromptLoss(NamedTuple):
    """Of one micro-batch: what is minimised, and the answer tokens' NLL, [A] nats."""

    loss: Tensor
    token_nll: Tensor


class PromptObjective(nn.Module):
    """The loss of an answer whose prompt is read by the LoRA model; the backbone stays out of the module
    tree.

    Its parameters are ``adapter.NAME``, with every dot of the model's own name written as ``/``.
    """

    def __init__(self, model: PeftModel):
        super().__init__()
        self.adapter = nn.Module()
        for name, parameter in trainable(model).items():
            self.adapter.register_parameter(_flat(name), parameter)
        self.model = (model,)  # a tuple hides it from the module tree

    def forward(self, batch: EpisodeBatch) -> PromptLoss:
        (model,) = self.model
        logits = answer_logits(model, cast(PreTrainedModel, model.get_base_model()), batch, past_key_values=NoCache())
        tokens = token_nll(logits, batch)
        return PromptLoss(answer_nll(tokens, batch), tokens.detach())

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, Tensor]:
        """{"nll": answer NLL of every batch, [N], in nats per token}."""
        return {"nll": torch.stack([self(batch).loss for batch in batches])}


def collate_prompts(
    episodes: pa.Table, groups: list[list[int]], tokenizer: PreTrainedTokenizerBase, context: bool
) -> EpisodeBatch:
    """Tensors of some groups of rows for :class:`PromptObjective`; nothing is to be written to a memory.

    Args:
        context: put the written messages before the question, in one chat.
    """
    rows = read_rows(episodes, [row for group in groups for row in group], episodes.column_names)
    for row in rows:
        row["context_ids"], row["segment_ids"] = [], []
        if context:
            row["question_ids"] = encode_messages(tokenizer, whole_chat(row), True, segment=None).input_ids
    table = pa.Table.from_pylist(rows, schema=episodes.schema)
    return collate(table, [[number] for number in range(len(rows))], tokenizer.pad_token_id)


def _flat(name: str) -> str:
    return name.replace(".", "/")
