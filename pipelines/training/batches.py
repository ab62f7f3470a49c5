"""Which episodes make up an optimiser step, and how a worker turns its share into tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipelines.config import Train
from pipelines.errors import StageError


@dataclass(frozen=True)
class EpisodeBatch:
    """C written contexts and the Q questions asked of them.

    Contexts are padded right, questions with their answers left, so that all answers end together.

    Attributes:
        context_ids, context_mask, segment_ids: [C, W] int64; segment -1 is not written by ssw.
        input_ids, attention_mask: [Q, R] int64, question and answer.
        answer_lengths: [Q] int64, supervised tokens at the end of each row.
        longest_answer: the largest of them.
        owner: [Q] int64, the row of the context that a question belongs to.
    """

    context_ids: Tensor
    context_mask: Tensor
    segment_ids: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    answer_lengths: Tensor
    longest_answer: int
    owner: Tensor

    def to(self, device: torch.device) -> EpisodeBatch:
        stay = ("segment_ids",)  # on the CPU the number of segments is known without asking the device
        moved = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in stay else v
            for k, v in vars(self).items()
        }
        return EpisodeBatch(**moved)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding, written and read."""
        return int(self.context_mask.sum() + self.attention_mask.sum())


class Schedule:
    """The fixed order of episodes: the same for every number of workers and after every restart.

    Questions of one paper are grouped ``questions_per_write`` at a time (1 in the paper); a group is one written
    context. Each epoch shuffles the groups by (seed, epoch); its last step is filled up from its beginning. A step's
    groups are sorted by length before they are dealt out, so that a micro-batch holds groups of like length.

    Raises:
        StageError: no episodes, or the batch doesn't divide over the workers.
    """

    def __init__(self, episodes: pa.Table, train: Train, seed: int, workers: int):
        self.seed, self.workers = seed, workers
        self.groups = _group(episodes["paper_id"].to_pylist(), train.questions_per_write)
        if not self.groups:
            raise StageError("there are no training episodes: see the preprocess stage's manifest for what it dropped")
        self.lengths = pc.list_value_length(episodes["context_ids"]).to_pylist()
        self.micro = max(1, train.micro_batch_size // train.questions_per_write)
        self.per_step = max(1, train.batch_size // train.questions_per_write)
        if self.per_step % (self.micro * workers):
            raise StageError(
                f"train.batch_size: {self.per_step} contexts per step can't be dealt to {workers} workers × "
                f"{self.micro} per micro-batch; make batch_size a multiple of num_workers × micro_batch_size"
            )
        self.accumulation = self.per_step // (self.micro * workers)
        self.steps_per_epoch = math.ceil(len(self.groups) / self.per_step)
        total = self.steps_per_epoch * train.epochs
        self.steps = min(total, train.max_steps) if train.max_steps else total

    def micro_batches(self, step: int, rank: int) -> list[list[list[int]]]:
        """The micro-batches of one worker in one step: lists of groups, a group a list of row numbers."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        chosen = [order[i % len(order)] for i in range(position * self.per_step, (position + 1) * self.per_step)]
        chosen.sort(key=lambda g: (self.lengths[self.groups[g][0]], g))
        batches = [chosen[i : i + self.micro] for i in range(0, self.per_step, self.micro)]
        return [[self.groups[g] for g in batch] for batch in batches[rank :: self.workers]]


def collate(episodes: pa.Table, groups: list[list[int]], pad_id: int) -> EpisodeBatch:
    """Tensors of some groups of rows."""
    contexts, segments, reads, answers, owner = [], [], [], [], []
    for number, rows in enumerate(groups):
        for i, row in enumerate(episodes.take(rows).to_pylist()):
            if i == 0:
                contexts.append(row["context_ids"])
                segments.append(row["segment_ids"])
            reads.append(row["question_ids"] + row["answer_ids"])
            answers.append(len(row["answer_ids"]))
            owner.append(number)
    context_ids, context_mask = pad(contexts, pad_id, "right")
    input_ids, attention_mask = pad(reads, pad_id, "left")
    return EpisodeBatch(
        context_ids,
        context_mask,
        pad(segments, -1, "right")[0],
        input_ids,
        attention_mask,
        torch.tensor(answers),
        max(answers),
        torch.tensor(owner),
    )


def pad(rows: list[list[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as [B, longest] int64, and their mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), value), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _group(paper_ids: list[str], size: int) -> list[list[int]]:
    by_paper = defaultdict(list)
    for row, paper in enumerate(paper_ids):
        by_paper[paper].append(row)
    return [rows[i : i + size] for rows in by_paper.values() for i in range(0, len(rows), size)]
