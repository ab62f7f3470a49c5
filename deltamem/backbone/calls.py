"""What every call of a model with a memory must hold to: shapes, positions, caches. Errors say what to do instead."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from deltamem.backbone import facts
from deltamem.config import DeltaMemConfig
from deltamem.errors import DeltaMemError, MemoryMismatchError, SegmentsMissingError
from deltamem.layer import MemoryLayers
from deltamem.memory import DeltaMemory


def check_tokens(input_ids: Tensor) -> None:
    """Token ids are [B, T] integers, at least one.

    Raises:
        DeltaMemError: they aren't.
    """
    if not isinstance(input_ids, Tensor):
        raise DeltaMemError(
            f"input_ids must be a tensor [B, T] of token ids, got {type(input_ids).__name__}; of a tokenizer's result "
            "pass .input_ids, made with return_tensors='pt'"
        )
    if input_ids.dim() != 2:
        raise DeltaMemError(
            f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}; one sequence is a batch of one: "
            "input_ids[None]"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise DeltaMemError(f"input_ids must be integers, got {input_ids.dtype}")
    if 0 in input_ids.shape:
        raise DeltaMemError(f"input_ids is empty (shape {tuple(input_ids.shape)}): there is nothing to read or write")


def valid_tokens(attention_mask: Tensor | None, input_ids: Tensor, past: int | None) -> Tensor | None:
    """Which tokens of a pass aren't padding: [B, T] bool; None: all.

    Args:
        attention_mask: [B, T] or [B, past + T], 0 marks padding.
        past: tokens in the cache; None: unknown.

    Raises:
        DeltaMemError: the mask doesn't fit.
    """
    if attention_mask is None:
        return None
    batch, length = input_ids.shape
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or (attention_mask.shape[1] < length if past is None else attention_mask.shape[1] != past + length):
        whole = f"({batch}, {length if past is None else past + length})"
        raise DeltaMemError(
            f"attention_mask must be the 2-D padding mask [B, T] or [B, past + T] of input_ids "
            f"{tuple(input_ids.shape)}{'' if not past else f' after {past} cached tokens'}, that is {whole}; got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask[:, -length:].bool()


def check_prompt(input_ids: Tensor, mask: Tensor, start: int) -> None:
    """A prompt for ``generate`` and the mask that covers it, cached tokens included.

    Args:
        input_ids: [B, T], cached tokens among them or not.
        mask: [B, T] or [B, start + T].
        start: tokens in the cache.

    Raises:
        DeltaMemError: they don't fit each other, or there is nothing new.
    """
    batch, length = input_ids.shape
    if tuple(mask.shape) not in ((batch, length), (batch, start + length)):
        cached = f" or ({batch}, {start + length}), cached tokens included" if start else ""
        raise DeltaMemError(
            f"attention_mask must be the 2-D padding mask ({batch}, {length}){cached}; got {tuple(mask.shape)}"
        )
    if mask.shape[1] <= start:
        raise DeltaMemError(
            f"the cache holds {start} tokens and the prompt covers {mask.shape[1]}: pass the whole prompt, cached "
            "tokens included and at least one new, or an attention_mask that covers both"
        )


def need_segments(config: DeltaMemConfig, segment_ids: Tensor | None, write: bool, length: int) -> None:
    """ssw is told the segments of several tokens that it is to write.

    Raises:
        SegmentsMissingError: it isn't.
    """
    if config.strategy == "ssw" and write and segment_ids is None and length > 1:
        raise SegmentsMissingError(
            "ssw writes one mean per segment and was not told where segments begin and end: pass segment_ids "
            "[B, T] (deltamem.encode_messages derives them from a chat template), or write=False to read only"
        )


def check_memory(memory: DeltaMemory, layers: MemoryLayers, batch: int) -> None:
    """A memory is this adapter's and this batch's, in float32 (or wider), where the layers are.

    Args:
        layers: the adapter's :class:`deltamem.layer.DeltaMemLayer`, by their numbers as text.

    Raises:
        MemoryMismatchError: it isn't.
    """
    if not isinstance(memory, DeltaMemory):
        raise MemoryMismatchError(
            f"memory must be a DeltaMemory (model.new_memory makes one), got {type(memory).__name__}"
        )
    numbers = {int(i) for i in layers}
    if set(memory.states) != numbers:
        raise MemoryMismatchError(
            f"the memory has states for layers {sorted(memory.states)}, the adapter for {sorted(numbers)}"
        )
    for i, layer in layers.items():
        state, device = memory.states[int(i)], layer.in_proj.device
        expected = (batch, layer.num_states, layer.rank, layer.rank)
        if tuple(state.shape) != expected:
            raise MemoryMismatchError(
                f"the memory's states are {tuple(state.shape)}, this adapter and batch need {expected}"
            )
        if state.dtype not in (torch.float32, torch.float64) or state.device != device:
            raise MemoryMismatchError(
                f"the memory's states are {state.dtype} on {state.device}, this adapter needs torch.float32 on "
                f"{device}; memory.to({str(device)!r}) moves it"
            )


def check_segments(segment_ids: Tensor, shape: tuple[int, ...]) -> None:
    """Segments are integers, one for each token.

    Raises:
        SegmentsMissingError: they aren't.
    """
    if not isinstance(segment_ids, Tensor) or tuple(segment_ids.shape) != shape or segment_ids.is_floating_point():
        found = tuple(segment_ids.shape) if isinstance(segment_ids, Tensor) else type(segment_ids).__name__
        dtype = f" {segment_ids.dtype}" if isinstance(segment_ids, Tensor) else ""
        raise SegmentsMissingError(
            f"segment_ids must have input_ids' shape {shape}, tokens in a cache included in generate(), and be "
            f"integers; got {found}{dtype}"
        )


def check_positions(options: dict[str, Any], valid: Tensor | None) -> None:
    """Positions grow along each row.

    A row is one sequence with one memory, which would run on from one packed document into the next.

    Args:
        options: what the backbone's forward is to be called with.
        valid: [B, T] bool or None.

    Raises:
        DeltaMemError: several documents are packed into a row.
    """
    packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if options.get(name) is not None]
    positions = options.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1:
        goes_back = positions[:, 1:] <= positions[:, :-1]
        if valid is not None:  # where padding ends, positions may start again
            goes_back = goes_back & valid[:, 1:] & valid[:, :-1]
        if bool(goes_back.any()):
            packed.append("position_ids")
    if packed:
        raise DeltaMemError(
            f"{packed[0]}: several documents are packed into one row, but a row has one memory, which would run on "
            "from one into the next; give each document a row of its own, padded, with an attention_mask"
        )


def check_cache(config: PreTrainedConfig, past: int, length: int) -> None:
    """Cached keys stay good for what follows them.

    Raises:
        DeltaMemError: under longrope the keys of short texts are made with other factors than those of long ones.
    """
    switch = facts.longrope_switch(config)
    if switch is not None and 0 < past <= switch < past + length:
        raise DeltaMemError(
            f"this backbone's longrope makes keys with other factors beyond {switch} tokens: a cache of {past} tokens "
            f"can't go on to {past + length}; read the whole text again in one pass, without that cache"
        )


def checked_strength(strength: float) -> float:
    """The strength as a number.

    Raises:
        DeltaMemError: it is none, or not finite.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise DeltaMemError(f"strength must be a finite number (1 as trained, 0 the frozen backbone), got {strength!r}")
    return float(strength)


def cache_length(cache: Any) -> int | None:
    """Tokens in a cache; None where only the device knows (a static cache's length is a tensor), 0 without a cache."""
    if cache is None:
        return 0
    if not callable(getattr(cache, "get_seq_length", None)):
        raise DeltaMemError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    length = cache.get_seq_length()
    return length if isinstance(length, int) else None
