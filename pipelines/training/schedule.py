"""Which episodes make up an optimiser step, on which worker, in which order."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipelines.errors import StageError
from pipelines.training.beside import Beside, Companions
from pipelines.training.lanes import Group, Lanes

if TYPE_CHECKING:  # benchmarks run where what reads configurations isn't installed
    from pipelines.config import Data, Train


ALIKE = 32
"""Steps among which groups of similar lengths are dealt."""


class MicroBatch(NamedTuple):
    """What one worker reads in one forward pass.

    Attributes:
        groups: lists of row numbers; the rows of a group share one written context.
        weight: what its mean loss counts in the step's mean over micro-batches and workers, so that every question of
            the step counts alike.
        beside: what its texts have beside them, where something of the kind is trained.
    """

    groups: list[list[int]]
    weight: float
    beside: Beside | None = None


@dataclass(frozen=True)
class Mixture:
    """How the sources of a training are mixed.

    Attributes:
        weights: of every source by its name; how often a written context is drawn from it, relative to the others.
        homogeneous: every step draws from one source, instead of every context of a step from any.
        spans: [start, stop) of the sources that aren't drawn from in all of the training, as shares of the steps.
    """

    weights: dict[str, float]
    homogeneous: bool
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data) -> Mixture | None:
        """The mixture of a data section; None where it has a single ``source``."""
        return cls(data.weights, data.steps == "homogeneous", data.spans) if data.sources else None

    def weights_at(self, step: int, steps: int) -> list[float]:
        """The weights in one step, in the order of the sources."""
        spans = {name: self.spans.get(name, (0.0, 1.0)) for name in self.weights}
        return [
            weight if spans[name][0] <= step / steps < spans[name][1] else 0.0 for name, weight in self.weights.items()
        ]


class Schedule:
    """The fixed order of episodes: the same for every number of workers and after every restart.

    Questions of one paper are grouped ``questions_per_write`` at a time (1 in the paper); a group is one written
    context. Each epoch shuffles the groups by (seed, epoch); its last step is filled up from its beginning. A step's
    groups are sorted by length and cut into as many micro-batches as ``micro_batch_size`` makes, with fewer long ones
    or more short ones in each: so that, padded, the largest is as small as it can be.

    Of a mixture every source is such an order of its own, and a step's groups, or all of them if the steps are to be
    homogeneous, are the next of the sources that are drawn for it by (seed, step). An epoch is as many groups as the
    sources have together. Homogeneous steps are of groups of similar lengths, too: among the next few dozen steps of a
    source its groups are sorted by length and dealt to them, so that little of a step is padding.

    Args:
        mixture: weights and kind of steps, where the episodes are of several sources.
        companions: draws what every step's texts have beside them.
        carries: whether memories go on from step to step, where ``train.carry_memory`` says so.

    Raises:
        StageError: no episodes, none of a source that has a weight, or the batch doesn't divide over the workers.
    """

    def __init__(
        self,
        episodes: pa.Table,
        train: Train,
        seed: int,
        workers: int,
        mixture: Mixture | None = None,
        companions: Companions | None = None,
        carries: bool = False,
    ):
        self.seed, self.workers, self._companions = seed, workers, companions
        self.groups = group_rows(episodes["paper_id"].to_pylist(), train.questions_per_write)
        if not self.groups:
            raise StageError("there are no training episodes: see the preprocess stage's manifest for what it dropped")
        written, asked, answered = (
            pc.call_function("list_value_length", [episodes[name]]).to_pylist()
            for name in ("context_ids", "question_ids", "answer_ids")
        )
        self.lengths = [written[rows[0]] + sum(asked[row] + answered[row] for row in rows) for rows in self.groups]
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
        self._members = self._by_source(episodes["source"], mixture)
        self._alike = mixture is not None and mixture.homogeneous
        self._drawn = self._draw(mixture)
        self._order = lru_cache(maxsize=2 * len(self._members))(self._shuffled)
        self._batches = lru_cache(maxsize=64)(self._cut)
        self._lanes = None
        if carries and train.carry_memory:
            self._lanes = Lanes(train, seed, self.per_step, written, lambda step, number: self._batches(step)[number])

    def _by_source(self, sources: pa.ChunkedArray, mixture: Mixture | None) -> list[list[int]]:
        """The groups of every source, in the order of the mixture's weights."""
        if mixture is None:
            return [list(range(len(self.groups)))]
        names, members = sources.to_pylist(), {name: [] for name in mixture.weights}
        for number, rows in enumerate(self.groups):
            members[names[rows[0]]].append(number)
        for name, found in members.items():
            if mixture.weights[name] and not found:
                raise StageError(
                    f"data.sources.{name}: no training episode is left of it, and its weight is "
                    f"{mixture.weights[name]:g}; see the preprocess stage's manifest for what it dropped, or give it "
                    "the weight 0"
                )
        return list(members.values())

    def _draw(self, mixture: Mixture | None) -> Tensor:
        """How many groups of every source come before each step, [steps + 1, sources] int64."""
        if mixture is None:
            counts = torch.full((self.steps, 1), self.per_step)
        else:
            rows = [mixture.weights_at(step, self.steps) for step in range(self.steps)]
            weights = torch.tensor(rows, dtype=torch.float64)
            generator = torch.Generator().manual_seed(self.seed)
            draws = 1 if mixture.homogeneous else self.per_step
            drawn = torch.multinomial(weights, draws, replacement=True, generator=generator)
            counts = torch.nn.functional.one_hot(drawn, len(mixture.weights)).sum(1) * (self.per_step // draws)
        return torch.cat([torch.zeros_like(counts[:1]), counts.cumsum(0)])

    @property
    def tokens(self) -> int:
        """Written and read in all steps, about: of every source as many groups as are drawn, of its mean length."""
        means = [sum(self.lengths[group] for group in members) / max(1, len(members)) for members in self._members]
        return round(sum(count * mean for count, mean in zip(self._drawn[-1].tolist(), means, strict=True)))

    def _chosen(self, source: int, first: int, last: int) -> list[int]:
        """The groups of a source from one place in its endless order to another."""
        members = self._members[source]
        length = math.ceil(len(members) / self.per_step) * self.per_step or 1
        chosen = []
        for epoch in range(first // length, -(-last // length)):
            order = self._order(source, epoch)
            begin, end = (min(max(place - epoch * length, 0), length) for place in (first, last))
            chosen += [members[order[place % len(order)]] for place in range(begin, end)]
        return chosen

    def _shuffled(self, source: int, epoch: int) -> list[int]:
        """The order of a source's groups in one of its epochs, by their places among its members."""
        # the first source's orders are those of a training on it alone
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + source * 7_919_000_017)
        order = torch.randperm(len(self._members[source]), generator=generator).tolist()
        if not self._alike:
            return order
        lengths = [self.lengths[group] for group in self._members[source]]
        blocks = _runs(order, ALIKE * self.per_step)
        return [place for block in blocks for place in self._dealt(block, lengths, generator)]

    def _dealt(self, block: list[int], lengths: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """Places of groups, those of similar lengths in a step, the steps in a random order."""
        steps = _runs(sorted(block, key=lengths.__getitem__), self.per_step)
        last = steps.pop() if len(steps[-1]) < self.per_step else []  # filled up from the epoch's beginning
        for number in torch.randperm(len(steps), generator=generator).tolist():
            yield from steps[number]
        yield from last

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of one worker in one step."""
        batches = self._batches(step)
        beside = self._companions.beside(step, self.steps, batches) if self._companions else [None] * len(batches)
        asked = batches
        if self._lanes:
            lanes = [self._lanes.of(step, number) for number in range(len(batches))]
            beside = [replace(part or Beside(), lanes=its) for part, its in zip(beside, lanes, strict=True)]
            asked = [[lane.asked for lane in its] for its in lanes]
        sizes = [sum(map(len, batch)) for batch in asked]
        weights = [size * len(batches) / sum(sizes) for size in sizes]
        return list(map(MicroBatch, batches, weights, beside))[rank :: self.workers]

    def _cut(self, step: int) -> list[list[Group]]:
        """The groups of all micro-batches, whose workers take turns."""
        places = zip(self._drawn[step].tolist(), self._drawn[step + 1].tolist(), strict=True)
        chosen = [group for source, place in enumerate(places) for group in self._chosen(source, *place)]
        chosen.sort(key=lambda g: (self.lengths[g], g))
        cuts = cut_evenly([self.lengths[g] for g in chosen], self.accumulation * self.workers)
        return [[self.groups[g] for g in chosen[a:b]] for a, b in zip(cuts, cuts[1:], strict=False)]


def _runs(values: list[int], length: int) -> list[list[int]]:
    return [values[start : start + length] for start in range(0, len(values), length)]


def cut_evenly(lengths: list[int], parts: int) -> list[int]:
    """Where to cut ascending lengths into ``parts`` runs, none empty; 0 and the number of lengths are the outer cuts.

    The largest padded size of a run (its rows × its longest) is the smallest possible.
    """

    def cuts(limit: int) -> list[int]:
        found = [len(lengths)]
        while found[-1] > 0:
            found.append(found[-1] - min(found[-1], max(1, limit // lengths[found[-1] - 1])))
        return found[::-1]

    limits = range(lengths[-1] * len(lengths) + 1)
    best = cuts(bisect.bisect_left(limits, True, key=lambda limit: len(cuts(limit)) <= parts + 1))
    while len(best) <= parts:  # fewer runs would do: halve those with the most rows
        widest = max(range(len(best) - 1), key=lambda i: best[i + 1] - best[i])
        best.insert(widest + 1, (best[widest] + best[widest + 1]) // 2)
    return best


def group_rows(paper_ids: list[str], size: int) -> list[list[int]]:
    by_paper = defaultdict(list)
    for row, paper in enumerate(paper_ids):
        by_paper[paper].append(row)
    return [group for rows in by_paper.values() for group in _runs(rows, size)]
