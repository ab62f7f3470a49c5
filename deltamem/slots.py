"""A static cache whose rows are of different lengths and independent of each other, and the attention over it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from deltamem.decoder import find_decoder
from deltamem.errors import DeltaMemError
from deltamem.key_values import KeyValues
from deltamem_kernels import decode_attention

ATTENTION = "deltamem_slots"


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
        return KeyValues(tuple(tuple(x[slot : slot + 1, :, :length].clone() for x in pair) for pair in pairs))

    def _layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, made for keys and values like these when they are first needed."""
        if index == len(self.layers_keys):
            for kept, like in ((self.layers_keys, keys), (self.layers_values, values)):
                kept.append(like.new_zeros(self.slots, like.shape[1], self.capacity, like.shape[3]))
        return self.layers_keys[index], self.layers_values[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._layer(layer_idx, key_states, value_states)
        keys[self.rows, :, self.lengths] = key_states[:, :, 0]
        values[self.rows, :, self.lengths] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.capacity - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.capacity - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.capacity, 0


def with_slot_attention(model: PreTrainedModel) -> PreTrainedModel:
    """A twin of the model, of the same weights and hooks, whose attention is :func:`_attend`.

    Its mask [slots, 1, 1, 1] holds each slot's number of keys. Which attention a module takes stands in its
    configuration, so the twin has attention modules of its own, with another one, and of what holds them; all else it
    shares. The model itself, which other threads may be running, stays as it is.

    Raises:
        DeltaMemError: the ``forward`` of a module that holds attention was replaced, as accelerate does to spread one
            over devices; the twin's would be the module's own.
    """
    attentions = {layer.attention for layer in find_decoder(model).layers}

    def twin(module: nn.Module) -> nn.Module:
        if not any(inner in attentions for inner in module.modules()):
            return module
        if "forward" in vars(module):
            raise DeltaMemError(
                f"{type(module).__name__}: its forward was replaced, so decoding in slots can't change its attention; "
                "load the model onto one device, without device_map"
            )
        made = copy.copy(module)
        if module in attentions:
            made.config = copy.copy(module.config)
            made.config._attn_implementation = ATTENTION
        else:
            made._modules = {name: child and twin(child) for name, child in module._modules.items()}
        return made

    return twin(model)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [slots, heads, 1, D], key and value whole slots."""
    if kwargs.get("s_aux") is not None:
        raise DeltaMemError(f"{type(module).__name__}: decoding in slots doesn't know attention sinks; use generate()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = decode_attention(query[:, :, 0], key, value, attention_mask.view(-1), scale, sliding_window, softcap)
    return out.unsqueeze(1), None


AttentionInterface.register(ATTENTION, _attend)
