"""Every kind of strategy in one table: what its entries look like, how it is trained, loaded and reported.

δ-mem is compared with what needs no training and gives the frozen backbone a shorter history to read (retrieval by
BM25, compression by LLMLingua-2, MemoryBank), and with LoRA adapters trained on the same episodes: with the context in
the prompt (Context2LoRA), and without it, which shows what adapting to the answers' style buys by itself. MemGen and
MLP Memory, the paper's other two, are trained on them as well: what they keep lies in their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast

from deltamem.config import DeltaMemConfig
from pipelines.config import Cell, Config
from pipelines.config.adapter import THIRDS, adapter_config
from pipelines.config.strategies import (
    Bm25Strategy,
    DeltaStrategy,
    LlmLingua2Strategy,
    LoraStrategy,
    MemGenStrategy,
    MemoryBankStrategy,
    MlpMemoryStrategy,
)
from pipelines.config.types import Section

if TYPE_CHECKING:
    from pipelines.strategies.transform import ContextTransform, Summarise
    from pipelines.training.recipe import Recipe


@dataclass(frozen=True)
class Kind:
    """What the pipeline has to know of a kind. Code is named, as "module:name", and imported on use: a method brings
    libraries that whoever only plans or reports a run shouldn't wait for.

    Attributes:
        settings: class of its entries in the configuration.
        paper_row: from an entry to the row of the paper's table that it reproduces, None for none.
        transform: the :class:`ContextTransform` of a method without training.
        recipe: the :class:`Recipe` of a trained one.
        load: function (base, folder) that gives the frozen backbone with its adapter.
        has_memory: whether there is a memory to write, read and swap.
        description: of its registered models, where those have no pyfunc loader.
    """

    settings: type[Section]
    paper_row: Callable[[Any], str | None]
    transform: str | None = None
    recipe: str | None = None
    load: str | None = None
    has_memory: bool = False
    description: str | None = None


def _default_adapter(entry: DeltaStrategy) -> str | None:
    # by whose rule segments are told apart the paper doesn't say
    adapter = replace(adapter_config(entry.adapter, len(THIRDS)), segmentation="deltamem")
    return adapter.strategy if adapter == DeltaMemConfig(strategy=adapter.strategy) else None


KINDS: Mapping[str, Kind] = {
    "bm25": Kind(
        Bm25Strategy,
        lambda entry: "bm25",
        transform="pipelines.strategies.retrieval:Bm25",
    ),
    "llmlingua2": Kind(
        LlmLingua2Strategy,
        lambda entry: "llmlingua2",
        transform="pipelines.strategies.compression:LlmLingua2",
    ),
    "memory_bank": Kind(
        MemoryBankStrategy,
        lambda entry: "memory_bank",
        transform="pipelines.strategies.memory_bank:MemoryBank",
    ),
    "lora": Kind(
        LoraStrategy,
        lambda entry: "context2lora" if entry.context else None,
        recipe="pipelines.strategies.lora_recipe:LoraRecipe",
        load="pipelines.strategies.lora:load_lora",
        description="A LoRA adapter's files as PEFT writes them, without a pyfunc loader: download them and use "
        "peft.PeftModel.from_pretrained(backbone, FOLDER).",
    ),
    "memgen": Kind(
        MemGenStrategy,
        lambda entry: "memgen",
        recipe="pipelines.strategies.memgen_recipe:MemGenRecipe",
        load="pipelines.strategies.memgen_recipe:load_memgen",
        description="The weaver of MemGen, without a pyfunc loader: download its files and use "
        "pipelines.strategies.memgen_recipe.load_memgen(backbone, FOLDER).",
    ),
    "mlp_memory": Kind(
        MlpMemoryStrategy,
        lambda entry: "mlp_memory",
        recipe="pipelines.strategies.mlp_memory_recipe:MlpMemoryRecipe",
        load="pipelines.strategies.mlp_memory_recipe:load_mlp_memory",
        description="The network of MLP Memory, without a pyfunc loader: download its files and use "
        "pipelines.strategies.mlp_memory_recipe.load_mlp_memory(backbone, FOLDER).",
    ),
    "delta": Kind(
        DeltaStrategy,
        _default_adapter,
        recipe="pipelines.strategies.delta:DeltaRecipe",
        load="deltamem:DeltaMemModel.from_pretrained",
        has_memory=True,
    ),
}
"""In the order of the report."""


def context_transform(entry: Any, summarise: Summarise, device: str) -> ContextTransform:
    """What a method without training does to a context.

    Raises:
        StageError: the compression model can't be loaded.
    """
    return resolve_name(cast(str, KINDS[entry.kind].transform))(entry, summarise, device)


def recipe_of(config: Config, cell: Cell) -> Recipe:
    """The recipe of a cell's kind of strategy."""
    return resolve_name(cast(str, KINDS[cell.strategy.kind].recipe))(config, cell)


def load_adapter(kind: str, base: Any, folder: Any) -> Any:
    """A backbone with the adapter in a folder, for inference.

    Raises:
        StageError, DeltaMemError: the folder is damaged, or doesn't fit the backbone.
    """
    return resolve_name(cast(str, KINDS[kind].load))(base, folder)
