"""Training MemGen's weaver, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.config.strategies import LoraStrategy, MemGenStrategy
from pipelines.errors import StageError
from pipelines.strategies.adapter_folder import read_settings, write_adapter
from pipelines.strategies.lora import WEIGHTS, PromptLoss
from pipelines.strategies.lora_recipe import LoraRecipe
from pipelines.strategies.memgen import MemGen, ends_of
from pipelines.strategies.memgen_reader import EvaluatedMemGen
from pipelines.training.batches import EpisodeBatch
from pipelines.training.losses import answer_nll, token_nll

FORMAT = "memgen"
_ENDS = "ends"
"""Of the file's tensors the one that isn't trained: after which tokens latents may follow."""


class MemGenObjective(nn.Module):
    """Cross-entropy of an answer's tokens, each from the place in front of it, whether that is a token or a latent."""

    def __init__(self, memgen: MemGen):
        super().__init__()
        self.adapter = memgen.weaver
        self.memgen = (memgen,)  # a tuple hides the frozen backbone from the module tree

    def forward(self, batch: EpisodeBatch) -> PromptLoss:
        (memgen,) = self.memgen
        tokens = token_nll(memgen.answer_logits(*_rows(batch)), batch)
        return PromptLoss(answer_nll(tokens, batch), tokens.detach())

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, Tensor]:
        """{"nll": answer NLL of every batch, [N], in nats per token}."""
        (memgen,) = self.memgen
        memgen.model.eval()  # without dropout
        try:
            return {"nll": torch.stack([self(batch).loss for batch in batches])}
        finally:
            memgen.model.train()


class MemGenRecipe(LoraRecipe):
    """The weaver; its prompts are those of Context2LoRA, the context in front of the question."""

    @property
    def _settings(self) -> MemGenStrategy:
        return cast(MemGenStrategy, self.cell.strategy)

    @property
    def _lora(self) -> LoraStrategy:
        return LoraStrategy(kind="lora", context=True)

    @property
    def _ends(self) -> Tensor:
        return ends_of(self.tokenizer, self.backbone_config.get_text_config(decoder=True).vocab_size)

    def objective(self, base: PreTrainedModel) -> nn.Module:
        device = base.device
        ends = torch.zeros(0) if device.type == "meta" else self._ends
        memgen = MemGen(base, self._settings, ends)
        memgen.weaver.to(device)
        if self.cell.train.activation_checkpointing != "none":
            memgen.recompute_activations()
        memgen.model.train()
        return MemGenObjective(memgen)

    def misfits(self, folder: Path) -> list[str]:
        found, wanted = read_config(folder).model_dump(), self._settings.model_dump()
        shape = ("rank", "target_modules", "prompt_latents", "answer_latents")
        return [f"its {name} is {found[name]}, the strategy's {wanted[name]}" for name in shape
                if found[name] != wanted[name]]  # fmt: skip

    def start_from(self, objective: nn.Module, folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        cast(MemGenObjective, objective).adapter.load_state_dict({k: v for k, v in tensors.items() if k != _ENDS})

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        ends = self._ends.nonzero()[:, 0].int()
        write_adapter(folder, FORMAT, self._settings, self.origin, {**tensors, _ENDS: ends})


def read_config(folder: Path) -> MemGenStrategy:
    """The settings of a saved weaver. Raises StageError where there is none."""
    return read_settings(folder, FORMAT, MemGenStrategy, "weaver of MemGen")


def load_memgen(base: PreTrainedModel, folder: Path) -> EvaluatedMemGen:
    """A saved weaver on its backbone, for inference.

    Raises:
        StageError: the folder holds none, or it is damaged or of another backbone.
    """
    settings = read_config(folder)
    ends = torch.zeros(base.config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
    memgen = EvaluatedMemGen(base, settings, ends)
    try:
        tensors = load_file(folder / WEIGHTS)
        ends[tensors.pop(_ENDS).long()] = True
        memgen.weaver.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, RuntimeError, IndexError) as error:
        raise StageError(
            f"{folder}: this weaver doesn't fit the backbone ({error}). Remove it and train it again."
        ) from error
    memgen.weaver.to(base.device, base.dtype).requires_grad_(False)
    memgen.model.eval()
    return memgen


def _rows(batch: EpisodeBatch) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts and answers of a batch, whose rows hold one after the other."""
    prompts: list[list[int]] = []
    answers: list[list[int]] = [[] for _ in batch.owner]
    first: dict[int, int] = {}
    places = zip(batch.answer_rows.tolist(), batch.answer_columns.tolist(), batch.answer_ids.tolist(), strict=True)
    for row, column, token in places:
        first.setdefault(row, column)
        answers[row].append(token)
    for row, ids in enumerate(batch.input_ids.tolist()):
        prompts.append(ids[: first[row] + 1])
    return prompts, answers
