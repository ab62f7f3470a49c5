"""Many continuations of one beginning, whose keys and values all of them attend to where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from deltamem.decoding.attention import PREFIXED, with_attention
from deltamem.decoding.key_values import KeyValues
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel, backbone_of


class PrefixReader:
    """Forward passes over rows that go on from one beginning, which isn't copied for them.

    Args:
        model: a DeltaMemModel, or a bare backbone (then there is no memory). Its layers attend to all tokens
            (:func:`deltamem.decoding.attention.can_share_prefixes`).
    """

    def __init__(self, model: DeltaMemModel | PreTrainedModel):
        self.model = model
        self._twin = with_attention(backbone_of(model), PREFIXED)

    def forward(
        self,
        prefix: KeyValues,
        input_ids: Tensor,
        mask: Tensor,
        cache: Cache,
        memory: DeltaMemory | None,
        write: bool,
        segment_ids: Tensor | None,
        strength: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, DeltaMemory | None]:
        """Read, then (if asked) write, as the tokens pass; returns logits [B, T, V] and the memory after them.

        Args:
            prefix: keys and values of one row: the beginning.
            input_ids: [B, T] int.
            mask: [B, past + T]; 0 marks padding among the rows' own tokens.
            cache: of the rows' own tokens; it grows by T.
            memory, write, segment_ids, strength: as :meth:`deltamem.DeltaMemModel.forward` takes them.
            **options: what the backbone's forward takes.
        """
        call = None
        if isinstance(self.model, DeltaMemModel):
            call = self.model.delta_call(input_ids, mask, memory, write, segment_ids, strength, cache.get_seq_length())
            options["delta_call"] = call
        new, place = input_ids.shape[1], torch.arange(mask.shape[1], device=mask.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -new:] + prefix.length
        out = self._twin(
            input_ids,
            attention_mask=mask.bool()[:, None, None] & (place <= place[-new:, None]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            shared_prefix=prefix,
            **options,
        )
        if isinstance(self.model, DeltaMemModel) and call is not None:
            memory = self.model.memory_after(call, memory)
        return out.logits, memory
