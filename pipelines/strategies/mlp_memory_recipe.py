"""Training MLP Memory on the texts of the episodes, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem.backbone.no_cache import NoCache
from pipelines.config.strategies import MlpMemoryStrategy
from pipelines.errors import StageError
from pipelines.strategies.adapter_folder import read_settings, write_adapter
from pipelines.strategies.lora import WEIGHTS
from pipelines.strategies.mlp_memory import MlpMemory, mix_into, on_last_input
from pipelines.strategies.neighbours import Neighbours
from pipelines.training.batches import EpisodeBatch, collate
from pipelines.training.beside import Beside
from pipelines.training.recipe import Recipe

FORMAT = "mlp_memory"


class MlpMemoryLoss(NamedTuple):
    """Of one micro-batch, means over its tokens in nats; ``token_nll`` is of each, [n]."""

    loss: Tensor
    kl: Tensor
    nll: Tensor
    token_nll: Tensor


class MlpMemoryObjective(nn.Module):
    """(1 − w) · cross-entropy with the next token + w · KL(neighbours ‖ network), at every token of the texts.

    Args:
        neighbours: None: the objective only validates, by the cross-entropy.
    """

    def __init__(self, base: PreTrainedModel, network: MlpMemory, neighbours: Neighbours | None, kl_weight: float):
        super().__init__()
        self.adapter = network
        self.base = (base,)  # a tuple hides the frozen backbone from the module tree
        self.neighbours, self.kl_weight = neighbours, kl_weight

    def forward(self, batch: EpisodeBatch) -> MlpMemoryLoss:
        assert self.neighbours is not None
        logarithms, following, keys = self._predicted(batch)
        token_nll = F.nll_loss(logarithms, following, reduction="none")
        kl = self.neighbours.divergence(keys, logarithms).mean()
        loss = self.kl_weight * kl + (1 - self.kl_weight) * token_nll.mean()
        return MlpMemoryLoss(loss, kl.detach(), token_nll.mean().detach(), token_nll.detach())

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, Tensor]:
        """{"nll": of the tokens of every batch's texts, [N], in nats per token}."""
        losses = [F.nll_loss(*self._predicted(batch)[:2]) for batch in batches]
        return {"nll": torch.stack(losses)}

    def _predicted(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The network's log probabilities [n, V] after each token but a text's last, what followed, and their keys."""
        (base,) = self.base
        lengths = [batch.context_ids.shape[1]] * len(batch.papers)
        if batch.context_mask is not None:
            lengths = batch.context_mask.sum(1).tolist()
        read: list[Tensor] = []
        hook = on_last_input(base, read.append)
        try:
            with torch.no_grad():
                base.get_decoder()(batch.context_ids, past_key_values=NoCache(), use_cache=False)
        finally:
            hook.remove()
        states = torch.cat([row[: length - 1] for row, length in zip(read[0], lengths, strict=True)])
        following = torch.cat([row[1:length] for row, length in zip(batch.context_ids, lengths, strict=True)])
        first = self.neighbours.first if self.neighbours else {}
        starts = [first.get(paper, 0) for paper in batch.papers]
        keys = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
        return self.adapter(states).float().log_softmax(-1), following, keys


class MlpMemoryRecipe(Recipe):
    """The network. It learns each text once an epoch, however many questions there are about it."""

    _neighbours: Neighbours | None = None

    @property
    def _settings(self) -> MlpMemoryStrategy:
        return cast(MlpMemoryStrategy, self.cell.strategy)

    @property
    def sources(self) -> list[str]:
        return []  # answers aren't read, so that there is no loss of theirs to tell apart

    def usable(self, episodes: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        seen: set[str] = set()
        lengths = episodes["context_ids"].combine_chunks().value_lengths().to_pylist()
        kept = []
        for paper, length in zip(episodes["paper_id"].to_pylist(), lengths, strict=True):
            kept.append(paper not in seen and length > 1)
            seen.add(paper)
        return episodes.filter(pa.array(kept, pa.bool_())), {}

    def prepare(self, base: PreTrainedModel, episodes: pa.Table) -> None:
        device = base.device if base.device.type == "cuda" else None
        self._neighbours = Neighbours.of(_states(base, episodes), self._settings, device)

    def objective(self, base: PreTrainedModel) -> nn.Module:
        network = MlpMemory(base.config, self._settings.depth).to(base.device)
        return MlpMemoryObjective(base, network, self._neighbours, self._settings.kl_weight)

    def collate(self, episodes: pa.Table, groups: list[list[int]], beside: Beside | None = None) -> EpisodeBatch:
        return collate(episodes, groups, self.tokenizer.pad_token_id)

    def metrics(self, result: MlpMemoryLoss) -> dict[str, Tensor]:
        return {"loss": result.loss, "kl": result.kl, "text_nll": result.nll}

    def misfits(self, folder: Path) -> list[str]:
        found, wanted = read_config(folder).depth, self._settings.depth
        return [] if found == wanted else [f"its depth is {found}, the strategy's {wanted}"]

    def start_from(self, objective: nn.Module, folder: Path) -> None:
        cast(MlpMemoryObjective, objective).adapter.load_state_dict(load_file(folder / WEIGHTS))

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        write_adapter(folder, FORMAT, self._settings, self.origin, tensors)


@torch.no_grad()
def _states(base: PreTrainedModel, episodes: pa.Table) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.int64]]]:
    """Each text with its last hidden states and its tokens."""
    columns = episodes.select(["paper_id", "context_ids"])
    for batch in columns.to_batches(max_chunksize=1):
        (row,) = batch.to_pylist()
        ids = torch.tensor([row["context_ids"]], device=base.device)
        states = base.get_decoder()(ids, past_key_values=NoCache(), use_cache=False).last_hidden_state[0]
        yield row["paper_id"], states.float().cpu().numpy(), ids[0].cpu().numpy()


def read_config(folder: Path) -> MlpMemoryStrategy:
    """The settings of a saved network. Raises StageError where there is none."""
    return read_settings(folder, FORMAT, MlpMemoryStrategy, "network of MLP Memory")


def load_mlp_memory(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A saved network, mixed into its backbone.

    Raises:
        StageError: the folder holds none, or it is damaged or of another backbone.
    """
    settings = read_config(folder)
    network = MlpMemory(base.config, settings.depth)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise StageError(
            f"{folder}: this network doesn't fit the backbone ({error}). Remove it and train it again."
        ) from error
    network.to(base.device, base.dtype).requires_grad_(False).eval()
    return mix_into(base, network, settings.mix)
