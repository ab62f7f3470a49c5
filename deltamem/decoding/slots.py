"""A static cache whose rows are of different lengths and independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from deltamem.decoding.key_values import KeyValues


@dataclass(frozen=True)
class LayerSlots:
    """One layer's keys and values, [slots, heads, capacity, head_dim], and where the next ones go."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    lengths: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append one token to every slot, as attention modules ask a cache to."""
        self.keys[self.rows, :, self.lengths] = key_states[:, :, 0]
        self.values[self.rows, :, self.lengths] = value_states[:, :, 0]
        return self.keys, self.values


class SlotCache(Cache):
    """Keys and values of a fixed number of sequences, each in its own slot, without padding before or between tokens.

    One pass appends one token to every slot, at the place its length says.

    Attributes:
        lengths: [slots] int64, tokens in each slot.
        layers_keys, layers_values: for each layer [slots, heads, capacity, head_dim].
    """

    def __init__(self, slots: int, capacity: int, device: torch.device):
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)
        self.layers_keys: list[Tensor] = []
        self.layers_values: list[Tensor] = []

    def fill(self, slots: Sequence[int], keys: KeyValues, mask: Tensor | None = None) -> None:
        """Put sequences into slots, in place of what was there.

        Args:
            keys: of n sequences and T tokens; row i goes into ``slots[i]``.
            mask: [n, T], 0 marks padding, which may lie anywhere and is left out; None: there is none.
        """
        index = torch.tensor(list(slots), device=self.rows.device)
        tokens, order = keys.length, None
        counts = torch.full((len(slots),), tokens, device=self.rows.device)
        if mask is not None:
            counts = mask.sum(1)
            order = mask.bool().logical_not().int().argsort(dim=1, stable=True)[:, None, :, None]
        self.lengths[index] = counts
        for layer, pair in enumerate(keys.layers):
            for kept, new in zip(self._layer(layer, *pair), pair, strict=True):
                if order is not None:
                    new = new.gather(2, order.expand_as(new))
                kept[index, :, :tokens] = new

    def take(self, slot: int, length: int) -> KeyValues:
        """A copy of one slot's first ``length`` tokens."""
        pairs = zip(self.layers_keys, self.layers_values, strict=True)
        one = (slice(slot, slot + 1), slice(None), slice(length))
        return KeyValues(tuple((keys[one].clone(), values[one].clone()) for keys, values in pairs))

    def layer(self, index: int) -> LayerSlots:
        """A layer's slots, which are there once something was filled in or appended."""
        return LayerSlots(self.layers_keys[index], self.layers_values[index], self.rows, self.lengths)

    def _layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, made for keys and values like these when they are first needed."""
        if index == len(self.layers_keys):
            for kept, like in ((self.layers_keys, keys), (self.layers_values, values)):
                kept.append(like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3]))
        return self.layers_keys[index], self.layers_values[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        self._layer(layer_idx, key_states, value_states)
        return self.layer(layer_idx).update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.capacity - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.capacity - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.capacity, 0
