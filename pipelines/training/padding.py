"""Batches of a few shapes instead of many: padded so that nothing that is measured or learnt changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.training.batches import EpisodeBatch, Reads, Texts

LONG = 256
"""Tokens of a written text from which on padding costs more than another shape."""

CAPTURE = 300_000
"""Padded tokens that a graph runs in the time that it takes to make one, about 2 s for a small backbone on one H200."""


@dataclass(frozen=True)
class ReadShape:
    """Sizes of :class:`Reads`: Q prompts of R tokens, with A answer tokens in all."""

    prompts: int
    width: int
    answers: int

    @classmethod
    def of(cls, reads: Reads) -> ReadShape:
        return cls(*reads.input_ids.shape, len(reads.answer_ids))

    def rounded(self) -> ReadShape:
        """As :meth:`Shape.rounded`."""
        return ReadShape(_up(self.prompts, 8), _up(self.width, 8, least=16), _up(self.answers, 8, least=16))


@dataclass(frozen=True)
class Shape:
    """Sizes of an :class:`EpisodeBatch`, and what it has beside its questions.

    Attributes:
        texts, width: C and the largest W, of later texts too.
        later: how many times later texts are written.
        contrast: whether its questions are read with others' memories as well.
        kept: whether there are answers whose distributions are to be kept.
        begun: whether the memories need not be empty before.
    """

    texts: int
    width: int
    later: int
    contrast: bool
    kept: bool
    begun: bool
    questions: ReadShape
    repeat: ReadShape | None

    @classmethod
    def of(cls, batch: EpisodeBatch) -> Shape:
        """The sizes of a batch as it is."""
        width = max(texts.context_ids.shape[1] for texts in (batch, *batch.after))
        repeat = None if batch.repeat is None else ReadShape.of(batch.repeat)
        begun = batch.lanes is not None or batch.initial is not None
        also = batch.others is not None, batch.kept is not None, begun
        return cls(len(batch.context_ids), width, len(batch.after), *also, ReadShape.of(batch), repeat)

    def rounded(self) -> Shape:
        """A shape that holds it and, likely, others of its kind.

        A short width goes up to a power of two or half as much again, a long one by a quarter of one; other sizes,
        which are alike from batch to batch, by an eighth.
        """
        return replace(
            self,
            texts=_up(self.texts, 8),
            width=_up(self.width, 2 if self.width <= LONG else 4, least=16),
            questions=self.questions.rounded(),
            repeat=self.repeat and self.repeat.rounded(),
        )

    @property
    def fixed(self) -> tuple:
        """What padding can't make up for."""
        return self.later, self.contrast, self.kept, self.begun, self.repeat is None

    @property
    def kind(self) -> tuple:
        """What shapes that may grow into each other have in common."""
        return self.texts, self.width, *self.fixed

    def joined(self, other: Shape) -> Shape:
        """The smallest shape that holds two that differ in sizes only."""
        return replace(
            self,
            texts=max(self.texts, other.texts),
            width=max(self.width, other.width),
            questions=_larger(self.questions, other.questions),
            repeat=self.repeat and other.repeat and _larger(self.repeat, other.repeat),
        )

    @property
    def tokens(self) -> int:
        """With padding, of all its passes."""
        asked = self.questions.prompts * self.questions.width
        passes = asked * (1 + self.contrast + self.kept)
        repeated = 0 if self.repeat is None else self.repeat.prompts * self.repeat.width
        return self.texts * self.width * (1 + self.later) + passes + repeated

    def holds(self, other: Shape) -> bool:
        """Whether a batch of the other shape can be padded to this one."""
        return self.fixed == other.fixed and self == self.joined(other)


def plan(sample: Sequence[Shape], steps: int) -> list[Shape]:
    """Few shapes for the batches of a training, so that making graphs and padding together take the least time.

    Shapes are joined as long as the padding that this costs takes less time than making a graph more.

    Args:
        sample: shapes of some of its batches.
        steps: how many batches there are in all.
    """
    counts = Counter(shape.rounded() for shape in sample)
    found = {shape: count * steps / len(sample) for shape, count in counts.items()}

    def saved(one: Shape, other: Shape) -> float:
        both = one.joined(other).tokens
        return CAPTURE - found[one] * (both - one.tokens) - found[other] * (both - other.tokens)

    def pairs(shapes: Iterable[tuple[Shape, Shape]]) -> dict[tuple[Shape, Shape], float]:
        return {pair: saved(*pair) for pair in shapes if pair[0].fixed == pair[1].fixed}

    gains = pairs(combinations(found, 2))
    while gains and max(gains.values()) > 0:
        one, other = max(gains, key=gains.__getitem__)
        joined, count = one.joined(other), found.pop(one) + found.pop(other)
        found[joined] = found.pop(joined, 0) + count
        gains = {pair: gain for pair, gain in gains.items() if not {one, other, joined} & {*pair}}
        gains |= pairs((joined, shape) for shape in found if shape != joined)
    return sorted(found, key=lambda shape: shape.tokens)


def _larger(one: ReadShape, other: ReadShape) -> ReadShape:
    return ReadShape(*map(max, astuple(one), astuple(other)))


def _up(size: int, parts: int, least: int = 1) -> int:
    """The size, or the next that is a power of two and some of as many parts of it."""
    step = max(1, (1 << max(0, size - 1).bit_length() - 1 if size > 1 else 1) // parts)
    return max(least, -(-size // step) * step)


def padded(batch: EpisodeBatch, shape: Shape) -> EpisodeBatch:
    """The batch in a larger shape of its kind, on its device.

    A padded text is no token long and writes nothing, a padded question has no answer, a padded answer token has no
    weight. Every batch of a shape has masks, and tensors of the same sizes.
    """
    texts = (_padded_texts(part, shape) for part in (batch, *batch.after))
    own, *after = texts
    return replace(
        batch,
        **vars(own),
        **vars(_padded_reads(batch, shape.questions)),
        after=tuple(after),
        others=None if batch.others is None else _pad(batch.others, shape.questions.prompts),
        repeat=None if batch.repeat is None or shape.repeat is None else _padded_reads(batch.repeat, shape.repeat),
        kept=None if batch.kept is None else _pad(batch.kept, shape.questions.answers),
        initial=None if batch.initial is None else _padded_memories(batch.initial, shape.texts),
    )


def _padded_memories(states: Tensor, texts: int) -> Tensor:
    layers, _, *state = states.shape
    return _pad(states, layers, texts, *state)


def _padded_texts(texts: Texts, shape: Shape) -> Texts:
    mask = texts.context_mask
    if mask is None:
        mask = torch.ones_like(texts.context_ids, dtype=torch.bool)
    size = shape.texts, shape.width
    return Texts(_pad(texts.context_ids, *size), _pad(texts.segment_ids, *size, value=-1), _pad(mask, *size))


def _padded_reads(reads: Reads, shape: ReadShape) -> Reads:
    answers = (reads.answer_rows, reads.answer_columns, reads.answer_ids, reads.answer_weights)
    return Reads(
        _pad(reads.input_ids, shape.prompts, shape.width),
        *(_pad(part, shape.answers) for part in answers),
        owner=_pad(reads.owner, shape.prompts),
    )


def _pad(values: Tensor, *size: int, value: int = 0) -> Tensor:
    """Values in the first corner of a tensor of that size."""
    missing = [amount for have, want in zip(values.shape[::-1], size[::-1], strict=True) for amount in (0, want - have)]
    return F.pad(values, missing, value=value)
