"""Memories that go on from one step to the next, so that training shows long histories and costs no more for it.

A lane is a memory that texts of different steps are written into, one a step, without gradients from one to the other.
What is asked may be of an earlier text: to answer it, what was written since must have left it there.

Which lane a text goes into, where a lane begins anew and what is asked is drawn by (seed, step, micro-batch), a
micro-batch goes on from that of its number, and where a checkpoint may be all lanes begin anew: so it is the same for
every number of workers and after every restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # benchmarks run where what reads configurations isn't installed
    from pipelines.config import Train

NOWHERE = -1
"""In place of a lane: begins empty, is left nowhere."""

Group = list[int]


class Lane(NamedTuple):
    """Of a group of episodes that share a written text.

    Attributes:
        begins, ends: the lanes whose memory the text is written into, and where that is left after it.
        asked: rows of episodes whose questions are read then, the group's own or those of an earlier text.
    """

    begins: int
    ends: int
    asked: Group


class _Drawn(NamedTuple):
    lane_of_place: list[int]
    begins_anew: list[bool]
    asks: list[float]
    whom: list[float]


class Lanes:
    """The lanes of every step.

    Args:
        most: texts that a micro-batch may have, and so its lanes.
        written: tokens of each episode's text; where there are none, an empty memory is meant, which no lane is.
        groups: those of a step's micro-batch, by its number among those of all workers.
    """

    def __init__(
        self, train: Train, seed: int, most: int, written: Sequence[int], groups: Callable[[int, int], list[Group]]
    ):
        assert train.carry_memory is not None
        self.wanted, self.seed, self.most = train.carry_memory, seed, most
        self._written, self._groups = written, groups
        self._draw = lru_cache(maxsize=1024)(self._drawn)
        self._assigned = lru_cache(maxsize=1024)(self._assign)

    def of(self, step: int, number: int) -> list[Lane]:
        """For each group of a micro-batch, in their order."""
        drawn, found = self._draw(step, number), []
        for lane, group in self._assigned(step, number).items():
            if not self._written[group[0]]:
                found.append(Lane(NOWHERE, NOWHERE, group))
                continue
            before = self._history(step, number, lane)
            earlier = bool(before) and drawn.asks[lane] < self.wanted.ask_earlier
            asked = before[int(drawn.whom[lane] * len(before))] if earlier else group
            place = number * self.most + lane
            found.append(Lane(place if before else NOWHERE, place, asked))
        return found

    def _history(self, step: int, number: int, lane: int) -> list[Group]:
        """The groups whose texts are in a lane as a step begins, the last first."""
        found = []
        while not self._draw(step, number).begins_anew[lane]:
            step -= 1
            group = self._assigned(step, number).get(lane)
            if group and self._written[group[0]]:
                found.append(group)
        return found

    def _assign(self, step: int, number: int) -> dict[int, Group]:
        """The group that goes into each lane, in the order of the groups."""
        return dict(zip(self._draw(step, number).lane_of_place, self._groups(step, number), strict=True))

    def _drawn(self, step: int, number: int) -> _Drawn:
        of_lanes = torch.Generator().manual_seed(self.seed * 1_000_003 + number + 32_452_843_003)
        never = torch.rand(self.most, generator=of_lanes) >= self.wanted.share  # such a lane is an ordinary text
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + number * 7_919_003 + 15_485_863_003)
        places = torch.randperm(len(self._groups(step, number)), generator=generator).tolist()
        anew, asks, whom = torch.rand(3, self.most, generator=generator, dtype=torch.float64)
        begins = never | (anew < 1 / self.wanted.texts)
        if step % self.wanted.anew_every == 0:
            begins[:] = True
        return _Drawn(places, begins.tolist(), asks.tolist(), whom.tolist())
