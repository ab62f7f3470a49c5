"""What the texts of a step have beside them: others written after them, others to be told from, some to repeat.

All of it is drawn for a whole step, by (seed, step), and a micro-batch also writes what it needs of the others: so it
is the same for every number of workers and after every restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines.training.lanes import Lane

if TYPE_CHECKING:  # benchmarks run where what reads configurations isn't installed
    from pipelines.config import Train

FULL_UNTIL = 0.6
"""Of the time that a contrast lasts; from there on its weight falls linearly to zero."""


@dataclass(frozen=True)
class Beside:
    """Of one micro-batch, which writes C texts: those of its groups, and then some of others.

    Attributes:
        more: rows of episodes whose texts are written too.
        after: for each later write into the same memories, the C rows whose texts are written; a row of nothing written
            stands for itself, and writes nothing.
        others: of each group, which of the C memories is another document's, its own where nothing is written; None
            where nothing is contrasted.
        contrast: weight of the contrast in this step.
        repeated: the groups, by their places, whose texts are to be repeated; None where the step has none.
        repeat_weight: what each of them counts in the micro-batch's loss, so that all of the step count alike.
        lanes: of each group, where its memory begins and is left; None where all begin empty.
    """

    more: list[int] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)
    others: list[int] | None = None
    contrast: float = 0.0
    repeated: list[int] | None = None
    repeat_weight: float = 0.0
    lanes: list[Lane] | None = None


class Companions:
    """Draws the :class:`Beside` of every micro-batch of a step.

    The documents of a step are dealt round a ring. After a text come the next k of the ring; the other document is the
    one after these, followed by its own next k, so that the right text is nowhere in its memory. Where a step has too
    few documents for that, k is as large as they allow, and a single one is told from none. A document of which nothing
    is written is no part of the ring: its memory stays empty, and is told from none.
    """

    def __init__(self, episodes: pa.Table, train: Train, seed: int):
        self.train, self.seed = train, seed
        self.papers: list[str] = episodes["paper_id"].to_pylist()
        self.written: list[int] = pc.call_function("list_value_length", [episodes["context_ids"]]).to_pylist()

    @classmethod
    def of(cls, episodes: pa.Table, train: Train, seed: int) -> Companions | None:
        """None where the training has nothing of the kind."""
        wanted = train.contrast or train.repeat_text or train.write_after
        return cls(episodes, train, seed) if wanted else None

    def beside(self, step: int, steps: int, batches: Sequence[list[list[int]]]) -> list[Beside]:
        """Of all micro-batches of a step, each a list of groups of rows."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 104_729_000_003)
        rows = {self.papers[group[0]]: group[0] for batch in batches for group in batch if self.written[group[0]]}
        papers = list(rows)
        ring = [rows[papers[place]] for place in torch.randperm(len(papers), generator=generator).tolist()]
        contrast = contrast_weight(self.train, step / steps) if len(ring) > 1 else 0.0
        later = min(self._drawn_later(generator), (len(ring) - 2) // 2 if contrast else max(0, len(ring) - 1))
        texts = [self._texts(batch, ring, later, contrast) for batch in batches]
        return [replace(part, **repeats) for part, repeats in zip(texts, self._repeats(batches, ring), strict=True)]

    def _drawn_later(self, generator: torch.Generator) -> int:
        wanted = self.train.write_after
        if wanted is None:
            return 0
        shares = torch.tensor(wanted.shares, dtype=torch.float64)
        return wanted.texts[int(torch.multinomial(shares, 1, generator=generator))]

    def _texts(self, batch: list[list[int]], ring: list[int], later: int, contrast: float) -> Beside:
        """What a micro-batch writes beside its own texts, and which of its memories are others'."""
        place = {self.papers[row]: number for number, row in enumerate(ring)}

        def follower(row: int, distance: int) -> int:
            return ring[(place[self.papers[row]] + distance) % len(ring)] if self.written[row] else row

        texts = [group[0] for group in batch]
        others = [follower(row, later + 1) for row in texts] if contrast else []
        texts += [row for row in dict.fromkeys(others) if self.papers[row] not in {self.papers[own] for own in texts}]
        memories = {self.papers[row]: number for number, row in enumerate(texts)}
        return Beside(
            more=texts[len(batch) :],
            after=[[follower(row, distance) for row in texts] for distance in range(1, later + 1)],
            others=[memories[self.papers[row]] for row in others] if contrast else None,
            contrast=contrast,
        )

    def _repeats(self, batches: Sequence[list[list[int]]], ring: list[int]) -> list[dict[str, Any]]:
        """For each micro-batch the fields of :class:`Beside` about what is to be repeated."""
        wanted = self.train.repeat_text
        short = [row for row in ring if wanted and self.written[row] <= wanted.max_tokens]
        chosen = set(short[: wanted.texts] if wanted else [])
        places = [[number for number, group in enumerate(batch) if group[0] in chosen] for batch in batches]
        count, questions = sum(map(len, places)), sum(len(group) for batch in batches for group in batch)
        if not count:
            return [{}] * len(batches)
        return [
            {"repeated": found, "repeat_weight": questions / (count * sum(map(len, batch)))}
            for found, batch in zip(places, batches, strict=True)
        ]


def contrast_weight(train: Train, progress: float) -> float:
    """Of the contrast, after a share of the steps."""
    if train.contrast is None:
        return 0.0
    left = (train.contrast.until - progress) / (train.contrast.until * (1 - FULL_UNTIL))
    return train.contrast.weight * min(1.0, max(0.0, left))
