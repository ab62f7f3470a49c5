"""A cache that keeps nothing, which spares a training pass a wait for the device."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


class NoCache(Cache):
    """Pass it as ``past_key_values`` where no cache is wanted and no mask is needed.

    Without a cache and without a mask, transformers asks the device whether positions are those of packed sequences,
    and waits for the answer before the first layer. With a cache it takes plain causal attention for granted.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
