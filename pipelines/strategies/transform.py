"""Methods without training: the frozen backbone reads a shorter history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from pipelines.benchmarks.base import Context
from pipelines.config.types import Section

Settings = TypeVar("Settings", bound=Section)

Summarise = Callable[[Sequence[str], int], list[str]]
"""From texts, and a number of tokens, to a summary of each in at most so many."""


class ContextTransform(ABC, Generic[Settings]):
    """From a context to contexts with its questions and what the method lets the model read of its history.

    Args:
        settings: the strategy's entry.
        summarise: has the backbone summarise texts.
        device: where a model of the method's own may run.
    """

    def __init__(self, settings: Settings, summarise: Summarise, device: str) -> None:
        self.settings, self.summarise, self.device = settings, summarise, device

    @abstractmethod
    def __call__(self, context: Context) -> Iterator[Context]: ...
