"""The memory during transformers' own ``generate``: it follows the cache from pass to pass."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from deltamem.backbone.calls import check_cache
from deltamem.backbone.facts import longrope_switch
from deltamem.backbone.row_ends import RowEnds
from deltamem.backbone.steering import DeltaCall
from deltamem.errors import DeltaMemError, MemoryMismatchError
from deltamem.layer import MemoryLayers
from deltamem.memory import DeltaMemory
from deltamem.segments import rank_segments


class GenerationMemory:
    """The memory of one ``generate`` call.

    Args:
        layers: the adapter's.
        memory: the memory before the prompt.
        mask: [B, prompt] bool, which prompt tokens (those already in the cache included) are not padding.
        segment_ids: [B, prompt] int or None (ssw).
        write: False reads only.
        strength: of the steering.
        start: number of tokens already in the cache.
        ends: knows the rows that have ended: neither the token that ended one nor what follows is written, so that a
            row's memory doesn't depend on how long the other rows go on.
    """

    def __init__(
        self,
        layers: MemoryLayers,
        memory: DeltaMemory,
        mask: Tensor,
        segment_ids: Tensor | None,
        write: bool,
        strength: float,
        start: int,
        ends: RowEnds,
    ):
        self.layers, self.metadata = layers, memory.metadata
        self.states = self.before = dict(memory.states)
        self.mask, self.write, self.strength = mask, write, strength
        self.segment_ids = self.prompt_segments = segment_ids
        self.start = self.position = start
        self.ends = ends
        self.cache: Any = None  # a Cache that is a _FollowedByMemory, too
        self._alive: list[Tensor] = []  # of the tokens generated and fed, [B] bool each
        self._call: DeltaCall | None = None

    @contextmanager
    def running(self) -> Generator[None]:
        """Inside, the passes of ``generate`` read and write this memory; afterwards its cache is like any other."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
            if self.cache is not None:
                self.cache.generation_memory = None

    def follow(self, cache: Cache) -> None:
        """Take the cache (any Cache object, new or already filled) that generate goes on with."""
        if not isinstance(cache, _FollowedByMemory):
            cache.__class__ = _followed(type(cache))
        followed: Any = cache
        followed.generation_memory, self.cache = self, followed

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
            self._alive.append(self.ends.alive(batch, tokens.device))
            valid = self._alive[-1].unsqueeze(1)
        self.position += length
        self._call = DeltaCall(self.layers, self.states, valid, segments, self.write, self.strength)
        return self._call

    def begin_again(self, batch: int, device: torch.device) -> None:
        """The whole text so far, and one more token, comes in one pass: its keys were dropped.

        tsw and msw write it anew from the memory as it was before the prompt, as one pass over it would. ssw has
        written its segments: it only reads them again and writes the new token.

        Raises:
            DeltaMemError: part of the text was in the cache from the beginning, and is in the memory already.
        """
        if self.start:
            raise DeltaMemError(
                f"the text grows beyond {self.position} tokens, where this backbone's longrope makes all keys anew, "
                f"but its first {self.start} came in a cache; generate from the whole text, without that cache"
            )
        self._take()
        self._expand(batch)
        new = self.ends.alive(batch, device)
        self.mask = torch.cat([self.mask, torch.stack([*self._alive, new], 1).to(self.mask.device)], 1)
        self._alive, self.position = [], 0
        if self.segment_ids is None:
            self.states = {i: _repeated(state, batch) for i, state in self.before.items()}
        else:
            self.segment_ids = torch.full_like(self.mask, -1, dtype=torch.long)
            self.segment_ids[:, -1] = 0

    def memory(self) -> DeltaMemory:
        """The memory after the last pass."""
        self._take()
        return DeltaMemory(self.states, self.metadata)

    def reorder(self, rows: Tensor) -> None:
        """Follow the cache when beams are reordered or rows selected."""
        self._take()
        self.states = {i: s.index_select(0, rows.to(s.device)) for i, s in self.states.items()}

    def _take(self) -> None:
        if self._call is not None:
            self.states, self._call = self._call.memory_out, None

    def _expand(self, batch: int) -> None:
        """generate() repeats every row for its beams or for several samples; so does the memory."""
        self.states = {i: _repeated(state, batch) for i, state in self.states.items()}
        self.mask = _repeated(self.mask, batch)
        if self.segment_ids is not None:
            self.segment_ids = _repeated(self.segment_ids, batch)


def _repeated(rows: Tensor, batch: int) -> Tensor:
    have = rows.shape[0]
    if have == batch:
        return rows
    if batch % have:
        raise MemoryMismatchError(f"a memory of {have} sequences can't serve a batch of {batch}")
    return rows.repeat_interleave(batch // have, 0)


class _FollowedByMemory(Cache):
    """Mixed into the class of a cache object: the memory follows what ``generate`` does with its rows."""

    generation_memory: GenerationMemory | None = None
    is_croppable = False  # where it could be cropped, transformers would read tokens in advance and take them back

    def reorder_cache(self, beam_idx: Any):
        super().reorder_cache(beam_idx)
        if self.generation_memory is not None:
            self.generation_memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        if self.generation_memory is not None:
            self.generation_memory.reorder(indices)

    def crop(self, *args, **kwargs):
        raise DeltaMemError(
            "the cache was asked to forget tokens (assisted or speculative decoding does that), but a memory can't be "
            "rolled back token by token; generate without an assistant model and without prompt lookup"
        )


@lru_cache
def _followed(cache_class: type[Cache]) -> type[Cache]:
    return type(f"Memory{cache_class.__name__}", (_FollowedByMemory, cache_class), {})


# The generate() call of this thread, if there is one. Not an attribute of the cache: one that a finished call returned
# may be used with the bare backbone, which must then stay bare.
_running: ContextVar[GenerationMemory | None] = ContextVar("deltamem_generation", default=None)


def insert_call(module: PreTrainedModel, args: tuple, kwargs: dict):
    """Forward pre-hook of the backbone: the passes of a running ``generate`` get their DeltaCall."""
    memory = _running.get()
    if memory is None or kwargs.get("delta_call") is not None:
        return args, kwargs
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
    cache = kwargs.get("past_key_values")
    if cache is None and longrope_switch(module.config) is not None:
        # transformers drops the cache of a text that grows beyond the switch, and makes none for one that begins beyond
        if memory.position and tokens.shape[1] == memory.position + 1:
            memory.begin_again(*tokens.shape[:1], tokens.device)
        elif memory.position:
            if tokens.shape[1] == 1 and kwargs.get("position_ids") is not None:  # transformers before 5.20 or so
                raise DeltaMemError(
                    f"this version of transformers drops the cache at {memory.position} tokens and then feeds one "
                    "token without it: stay below that length (max_new_tokens), or install a later transformers"
                )
            return args, kwargs
        cache = kwargs["past_key_values"] = DynamicCache(config=module.config.get_text_config(decoder=True))
        memory.follow(cache)
    elif memory.cache is None and cache is not None:
        memory.follow(cache)
    if cache is not None and cache is memory.cache:  # not another text, read by a criterion or processor on the way
        check_cache(module.config, memory.position, tokens.shape[1])
        kwargs["delta_call"] = memory.begin(tokens)
    return args, kwargs
