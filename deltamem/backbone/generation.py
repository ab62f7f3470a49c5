"""The memory during transformers' own ``generate``: it travels in the cache object."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from deltamem.backbone.steering import DeltaCall
from deltamem.errors import DeltaMemError, MemoryMismatchError
from deltamem.memory import DeltaMemory
from deltamem.segments import rank_segments


class GenerationMemory:
    """The memory of one ``generate`` call, carried from step to step by the cache.

    Args:
        memory: the memory before the prompt.
        mask: [B, prompt] bool, which prompt tokens (those already in the cache included) are not padding.
        segment_ids: [B, prompt] int or None (ssw).
        write: False reads only.
        start: number of tokens already in the cache.
        end_ids: tokens after which a row has ended: neither they nor the padding that follows is written, so that
            a row's memory doesn't depend on how long the other rows go on.
    """

    def __init__(
        self,
        memory: DeltaMemory,
        mask: Tensor,
        segment_ids: Tensor | None,
        write: bool,
        start: int,
        end_ids: Tensor,
    ):
        self.metadata = memory.metadata
        self.states = dict(memory.states)
        self.mask, self.segment_ids, self.write = mask, segment_ids, write
        self.position, self.end_ids = start, end_ids
        self.alive: Tensor | None = None
        self.call: DeltaCall | None = None

    def begin(self, tokens: Tensor) -> DeltaCall:
        """The call of the next forward pass, which feeds ``tokens`` [B, T]."""
        self._take()
        batch, length = tokens.shape
        self._expand(batch)
        segments = None
        if self.position < self.mask.shape[1]:  # the prompt, whole or in chunks
            span = slice(self.position, self.position + length)
            valid = self.mask[:, span]
            if self.segment_ids is not None:
                segments = rank_segments(self.segment_ids[:, span], valid, tokens.device)
        else:
            if self.alive is None:
                self.alive = torch.ones(batch, dtype=torch.bool, device=tokens.device)
            self.alive = self.alive & ~torch.isin(tokens[:, -1], self.end_ids)
            valid = self.alive.unsqueeze(1)
        self.position += length
        self.call = DeltaCall(self.states, valid, segments, self.write)
        return self.call

    def memory(self) -> DeltaMemory:
        """The memory after the last pass."""
        self._take()
        return DeltaMemory(self.states, self.metadata)

    def reorder(self, rows: Tensor) -> None:
        """Follow the cache when beams are reordered or rows selected."""
        self._take()
        self.states = {i: s.index_select(0, rows.to(s.device)) for i, s in self.states.items()}
        if self.alive is not None:
            self.alive = self.alive.index_select(0, rows.to(self.alive.device))

    def _take(self) -> None:
        if self.call is not None:
            self.states, self.call = self.call.memory_out, None

    def _expand(self, batch: int) -> None:
        """generate() repeats every row for its beams or for several samples; so does the memory."""
        have = next(iter(self.states.values())).shape[0]
        if have == batch:
            return
        if batch % have:
            raise MemoryMismatchError(f"a memory of {have} sequences can't serve a batch of {batch}")
        repeats = batch // have
        self.states = {i: s.repeat_interleave(repeats, 0) for i, s in self.states.items()}
        self.mask = self.mask.repeat_interleave(repeats, 0)
        if self.segment_ids is not None:
            self.segment_ids = self.segment_ids.repeat_interleave(repeats, 0)


class _CarriesMemory:
    """Mixed into the class of a cache object; follows what ``generate`` does with its rows."""

    generation_memory: GenerationMemory

    def reorder_cache(self, beam_idx: Tensor):
        super().reorder_cache(beam_idx)
        self.generation_memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self.generation_memory.reorder(indices)

    def crop(self, *args, **kwargs):
        raise DeltaMemError(
            "the cache was asked to forget tokens (assisted or speculative decoding does that), but a memory can't be "
            "rolled back token by token; generate without an assistant model and without prompt lookup"
        )


@lru_cache
def _carrying(cache_class: type[Cache]) -> type[Cache]:
    return type(f"Memory{cache_class.__name__}", (_CarriesMemory, cache_class), {})


def attach_to_cache(cache: Cache, memory: GenerationMemory) -> None:
    """Let ``cache`` (any Cache object, new or already filled) carry the memory."""
    if not isinstance(cache, _CarriesMemory):
        cache.__class__ = _carrying(type(cache))
    cache.generation_memory = memory


def insert_call(module: PreTrainedModel, args: tuple, kwargs: dict):
    """Forward pre-hook of the backbone: a cache that carries a memory gives the pass its DeltaCall."""
    memory = getattr(kwargs.get("past_key_values"), "generation_memory", None)
    if memory is not None and "delta_call" not in kwargs:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        kwargs["delta_call"] = memory.begin(tokens)
    return args, kwargs


def new_cache(model: PreTrainedModel, prompt_length: int, options: dict) -> Cache:
    """The cache that ``generate`` would make; takes ``cache_implementation`` out of its options."""
    kind = options.pop("cache_implementation", None)
    config = model.config.get_text_config(decoder=True)
    if kind in (None, "dynamic"):
        return DynamicCache(config=config)
    if kind != "static":
        raise DeltaMemError(
            f"cache_implementation={kind!r}: pass such a cache as past_key_values=...; by name there are 'dynamic' "
            "and 'static'"
        )
    # transformers would compile the whole forward for a static cache; deltamem.decoding captures graphs
    options.setdefault("disable_compile", True)
    generation_config = options.get("generation_config") or model.generation_config
    new_tokens = options.get("max_new_tokens") or generation_config.max_new_tokens
    length = options.get("max_length") or generation_config.max_length or 20
    return StaticCache(config=config, max_cache_len=prompt_length + new_tokens if new_tokens else length)
