"""What an adapter is worth on held-out episodes, by source, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.training.batches import EpisodeBatch
from pipelines.training.recipe import Recipe
from pipelines.training.schedule import group_rows


class Validation:
    """The first held-out questions of every source, dealt to the workers.

    Attributes:
        columns: of the curve: validation/SOURCE/nll, the answer NLL in nats per token, and for an adapter with a memory
            validation/SOURCE/memory_effect, how much another text's memory adds to it, where a text was written.
    """

    def __init__(self, recipe: Recipe, rank: int, workers: int):
        train, episodes = recipe.cell.train, recipe.held_out()
        self.shares: dict[str, list[EpisodeBatch]] = {}
        size = max(1, train.micro_batch_size // train.questions_per_write)
        for source in episodes["source"].unique().to_pylist():
            asked = episodes.filter(pc.field("source") == source).slice(0, train.validation_questions)
            groups = _by_length(asked, group_rows(asked["paper_id"].to_pylist(), train.questions_per_write))
            batches = [groups[first : first + size] for first in range(0, len(groups), size)]
            self.shares[source] = [recipe.collate(asked, batch) for batch in batches[rank::workers]]
        self.names = ("nll", "memory_effect") if recipe.has_memory else ("nll",)
        self.columns = [_column(source, name) for source in self.shares for name in self.names]

    def measure(self, objective: Any, device: torch.device) -> dict[str, float]:
        """The values of the columns (a collective call); NaN where no worker could tell."""
        sums = {source: self._sums(objective, batches, device) for source, batches in self.shares.items()}
        if not sums:
            return {}
        totals = torch.stack(list(sums.values()))
        dist.all_reduce(totals)
        means = totals[..., 0] / totals[..., 1]
        return {
            _column(source, name): value
            for source, values in zip(sums, means.tolist(), strict=True)
            for name, value in zip(self.names, values, strict=True)
        }

    def _sums(self, objective: Any, batches: Sequence[EpisodeBatch], device: torch.device) -> Tensor:
        """This worker's sums over questions, and how many they are, [names, 2]."""
        sums = torch.zeros(len(self.names), 2, device=device)
        if not batches:
            return sums
        measured = objective.validate([batch.to(device) for batch in batches])
        questions = torch.tensor([float(len(batch.owner)) for batch in batches], device=device)
        for number, name in enumerate(self.names):
            if name in measured:
                sums[number, 0] = (measured[name].float() * questions).sum()
                sums[number, 1] = (questions * (measured["swapped"] if name == "memory_effect" else 1)).sum()
        return sums


def _by_length(episodes: pa.Table, groups: list[list[int]]) -> list[list[int]]:
    """The groups from short to long, so that little is padded."""
    lengths = pc.call_function("list_value_length", [episodes["context_ids"]]).to_pylist()
    return sorted(groups, key=lambda rows: (lengths[rows[0]], rows))


def _column(source: str, name: str) -> str:
    return f"validation/{source}/{name}"
