"""How episodes become tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from pipelines.data.shards import read_rows
from pipelines.training.beside import Beside
from pipelines.training.lanes import NOWHERE

_COLUMNS = ("source", "paper_id", "context_ids", "segment_ids", "question_ids", "answer_ids", "answer_weights")


class Read(NamedTuple):
    """A prompt and the answer to learn, as tokens, and the row of the memory that it is asked of.

    ``weights`` say what the answer's tokens count, relative to each other; None: all alike.
    """

    asked: list[int]
    answer: list[int]
    owner: int
    weights: list[float] | None = None


@dataclass(frozen=True)
class Reads:
    """Q prompts, each with its answer, A answer tokens in all.

    All rows are padded on the right: a token never attends to what comes after it, so the attention needs no mask.

    Attributes:
        input_ids: [Q, R] int64, question and answer.
        answer_rows, answer_columns: [A] int64, where in input_ids the token before each answer token stands.
        answer_ids: [A] int64.
        answer_weights: [A] float32; weighs every question alike, and the tokens of an answer alike or as the episodes
            say. They sum to 1 for the questions of a batch, and for texts to repeat to the share of them that is the
            batch's.
        owner: [Q] int64, the row of the memory that is read.
    """

    input_ids: Tensor
    answer_rows: Tensor
    answer_columns: Tensor
    answer_ids: Tensor
    answer_weights: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Texts:
    """C texts that are written side by side, padded on the right; one of no tokens leaves its memory as it was.

    Attributes:
        context_ids, segment_ids: [C, W] int64, W at least 1; segment -1 is not written by ssw.
        context_mask: [C, W] bool, False for padding; None where there is none.
    """

    context_ids: Tensor
    segment_ids: Tensor
    context_mask: Tensor | None


@dataclass(frozen=True)
class EpisodeBatch(Texts, Reads):
    """C written texts and the Q questions asked of them.

    Attributes:
        papers: of the C texts.
        tokens: tokens that are not padding, written and read.
        sources: of the Q questions, by their names in the data section.
        after: other texts, C each time, that are written into the same memories before the questions are read.
        others: [Q] int64, for each question the row of another document's memory; None where nothing is contrasted.
        contrast: scalar float32, weight of the contrast in the loss.
        repeat: prompts to repeat texts, with these as answers; None where there is none in the whole step.
        lanes: [C, 2] int64, in which lane each text's memory begins (-1: it is empty) and in which it is left (-1: in
            none); None where all begin empty.
        initial: [layers, C, N, r, r] float32, the memories that the texts are written into; None where all are empty.
        kept: [A] float32, the answer weights where the answer is the frozen backbone's own and its distribution is to
            be kept, else 0; None where there is no such answer.
    """

    papers: list[str]
    tokens: int
    sources: list[str] = field(default_factory=list)
    after: tuple[Texts, ...] = ()
    others: Tensor | None = None
    contrast: Tensor | None = None
    repeat: Reads | None = None
    kept: Tensor | None = None
    lanes: Tensor | None = None
    initial: Tensor | None = None

    def to(self, device: torch.device) -> EpisodeBatch:
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device, those of dataclasses inside as well."""
    if isinstance(value, Tensor):
        if device.type == "cuda":  # from memory that isn't pinned a copy waits for the device
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if not isinstance(value, Texts | Reads):
        return value
    stay = ("segment_ids",)  # on the CPU the number of segments is known without asking the device
    return replace(value, **{name: _moved(part, device) for name, part in vars(value).items() if name not in stay})


def collate(
    episodes: pa.Table,
    groups: list[list[int]],
    pad_id: int,
    beside: Beside | None = None,
    repetitions: Sequence[Read] = (),
    keep: Container[str] = (),
) -> EpisodeBatch:
    """Tensors of some groups of rows.

    Args:
        beside: what these texts have beside them.
        repetitions: the prompts to repeat the texts that it names, in its order.
        keep: the sources whose answers' distributions are to be kept.
    """
    beside = beside or Beside()
    asked_rows = groups if beside.lanes is None else [lane.asked for lane in beside.lanes]
    numbers = list({*chain(*groups, *asked_rows, beside.more, *beside.after)})
    row_of = dict(zip(numbers, read_rows(episodes, numbers, _COLUMNS), strict=True))
    questions = [(owner, row_of[number]) for owner, group in enumerate(asked_rows) for number in group]
    texts = [row_of[number] for number in (*(group[0] for group in groups), *beside.more)]
    reads = [Read(row["question_ids"], row["answer_ids"], owner, row["answer_weights"]) for owner, row in questions]
    after = [[row_of[number] for number in rows] for rows in beside.after]
    others, repeat = None, None
    if beside.others is not None:
        others = torch.tensor([beside.others[read.owner] for read in reads])
    if beside.repeated is not None:
        repeat = make_reads(repetitions, beside.repeat_weight, pad_id)
    asked = make_reads(reads, 1 / len(reads), pad_id)
    sources = [row["source"] for _, row in questions]
    to_keep = torch.tensor([source in keep for source in sources])
    lanes = None
    if beside.lanes is not None:
        lanes = torch.tensor(
            [(lane.begins, lane.ends) for lane in beside.lanes] + [(NOWHERE, NOWHERE)] * len(beside.more)
        )
    written = sum(len(text["context_ids"]) for some in (texts, *after) for text in some)
    return EpisodeBatch(
        **vars(asked),
        **vars(_make_texts(texts, pad_id)),
        papers=[text["paper_id"] for text in texts],
        tokens=written + sum(len(read.asked) + len(read.answer) for read in (*reads, *repetitions)),
        sources=sources,
        after=tuple(_make_texts(some, pad_id) for some in after),
        others=others,
        contrast=None if others is None else torch.tensor(beside.contrast),
        repeat=repeat,
        kept=asked.answer_weights * to_keep[asked.answer_rows] if to_keep.any() else None,
        lanes=lanes,
    )


def make_reads(reads: Sequence[Read], weight: float, pad_id: int) -> Reads:
    """Tensors of some prompts, maybe none, with the weight of each."""
    rows, columns, answers, weights = [], [], [], []
    for row, read in enumerate(reads):
        rows += [row] * len(read.answer)
        columns += range(len(read.asked) - 1, len(read.asked) + len(read.answer) - 1)
        answers += read.answer
        counts = read.weights or [1.0] * len(read.answer)
        weights += [weight / sum(counts) * count for count in counts]
    return Reads(
        pad([read.asked + read.answer for read in reads], pad_id)[0],
        *(torch.tensor(x, dtype=torch.long) for x in (rows, columns, answers)),
        answer_weights=torch.tensor(weights),
        owner=torch.tensor([read.owner for read in reads], dtype=torch.long),
    )


def _make_texts(rows: Iterable[dict[str, Any]], pad_id: int) -> Texts:
    # where no text has a token, they are all padding: a backbone reads no tensors of width 0
    ids, mask = pad([row["context_ids"] for row in rows], pad_id, least=1)
    return Texts(ids, pad([row["segment_ids"] for row in rows], -1, least=1)[0], None if mask.all() else mask)


def pad(rows: list[list[int]], value: int, least: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unequal length, padded on the right to [B, longest or ``least``] int64, and their mask, bool."""
    width = max([least, *map(len, rows)])
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
    return ids, torch.tensor([len(row) for row in rows])[:, None] > torch.arange(width)
