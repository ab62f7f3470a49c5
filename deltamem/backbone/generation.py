"""transformers' own ``generate``, run with a memory, and the memory of what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltamem.backbone.generation_memory import GenerationMemory
from deltamem.errors import DeltaMemError
from deltamem.memory import DeltaMemory


def run_generate(
    base: Any,
    traveller: GenerationMemory,
    input_ids: Tensor,
    mask: Tensor,
    arguments: dict[str, Any],
    forward: Callable[..., Any],
) -> Any:
    """What ``generate`` returns; an output object gets ``.memory``, a row for each of its sequences.

    Args:
        traveller: the memory before the prompt.
        mask: [B, prompt], cached tokens included.
        arguments: further ones, as ``generate`` takes them.
        forward: the model's, to read finished beams with.
    """
    cache = arguments.get("past_key_values")
    with traveller.running():
        if cache is not None:
            traveller.follow(cache)
        out = base.generate(input_ids, attention_mask=mask, **arguments)
    if isinstance(out, Tensor):
        return out
    if getattr(out, "beam_indices", None) is None:
        out.memory = traveller.memory()
        return out
    before = DeltaMemory(traveller.before, traveller.metadata)
    rows = rows_of(out.sequences, len(mask))
    out.memory = before.select(rows.to(before.device))
    if traveller.write:
        if traveller.start:
            raise DeltaMemError("beams from a filled cache: the memory of the sequence returned can't be recovered")
        alive = traveller.ends.alive_along(out.sequences, mask.shape[1])
        segments = traveller.prompt_segments
        segments = None if segments is None else segments[rows.to(segments.device)]
        out.memory = _read_beams(forward, out.sequences, mask[rows], alive, segments, out.memory)
    return out


def rows_of(sequences: Tensor, batch: int) -> Tensor:
    """[S] int64: which of ``batch`` prompts each of the S sequences returned continues."""
    return torch.arange(len(sequences), device=sequences.device) // (len(sequences) // batch)


@torch.no_grad()
def _read_beams(
    forward: Callable[..., Any],
    sequences: Tensor,
    mask: Tensor,
    alive: Tensor,
    segment_ids: Tensor | None,
    memory: DeltaMemory,
) -> DeltaMemory:
    """The memory of finished beams.

    Beam search ends with a cache of the beams it would have gone on with, which need not be the sequences it returns,
    so those are fed once more: the prompt, then what was generated.

    Args:
        sequences: [S, T].
        mask: [S, prompt]; 0 marks padding.
        alive: [S, T - prompt] bool, generated tokens that are written.
        segment_ids: [S, prompt] or None.
        memory: of S rows, before the prompt.
    """
    # where no token pads, transformers fills up with -1
    fed, prompt = sequences[:, :-1].clamp_min(0), mask.shape[1]
    mask = torch.cat([mask, alive[:, : fed.shape[1] - prompt].to(mask.dtype)], 1)
    out = forward(
        fed[:, :prompt],
        attention_mask=mask[:, :prompt],
        memory=memory,
        segment_ids=segment_ids,
        use_cache=True,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :prompt],
        logits_to_keep=1,
    )
    for t in range(prompt, fed.shape[1]):
        out = forward(
            fed[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            memory=out.memory,
            past_key_values=out.past_key_values,
            position_ids=(mask[:, : t + 1].sum(1, keepdim=True) - 1).clamp_min(0),
            use_cache=True,
        )
    return out.memory
