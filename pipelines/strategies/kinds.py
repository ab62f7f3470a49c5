"""What δ-mem is compared with, each a strategy of the configuration.

Three need no training and give the frozen backbone a shorter history to read: retrieval (BM25), compression
(LLMLingua-2) and MemoryBank. Two are LoRA adapters trained on the same episodes: with the context in the
prompt (Context2LoRA), and without it, which shows what adapting to the answers' style buys by itself.

MemGen and MLP Memory, the paper's other two, would each be a module here; see ``README.md`` in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipelines.config import Cell, Config
from pipelines.strategies.delta import DeltaRecipe
from pipelines.strategies.memory_bank import Summarise
from pipelines.training.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.benchmarks.base import Context
    from pipelines.config.strategies import Bm25Strategy, LlmLingua2Strategy, MemoryBankStrategy

ContextTransform = Callable[["Context"], Iterator["Context"]]
"""From a context to contexts with its questions and what the method lets the model read of its history."""


def context_transform(
    settings: Bm25Strategy | LlmLingua2Strategy | MemoryBankStrategy, summarise: Summarise, device: str
) -> ContextTransform:
    """The transform of a baseline that needs no training.

    Raises:
        StageError: the compression model can't be loaded.
    """
    if settings.kind == "bm25":
        from pipelines.strategies.retrieval import Bm25

        return Bm25(settings)
    if settings.kind == "llmlingua2":
        from pipelines.strategies.compression import LlmLingua2

        return LlmLingua2(settings, device)
    from pipelines.strategies.memory_bank import MemoryBank

    return MemoryBank(settings, summarise)


def recipe_of(config: Config, cell: Cell) -> Recipe:
    """The recipe of the cell's kind of strategy."""
    if cell.strategy.kind == "delta":
        return DeltaRecipe(config, cell)
    from pipelines.strategies.lora_recipe import LoraRecipe

    return LoraRecipe(config, cell)
