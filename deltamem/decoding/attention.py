"""Attention functions for decoding in slots and after a shared beginning, and the models that use them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from deltamem.backbone.decoder import find_decoder
from deltamem.decoding.key_values import KeyValues
from deltamem.errors import DeltaMemError
from deltamem_kernels import decode_attention, prefixed_attention

SLOTS = "deltamem_slots"
"""One token per row. The mask is [B, 1, 1, 1]: each row's number of keys."""
PREFIXED = "deltamem_prefixed"
"""Rows that go on from one beginning, the keyword argument ``shared_prefix``. The mask is [B, 1, T, S], bool."""


def with_attention(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A twin of the model, of the same weights and hooks, whose attention function is another one.

    Which function a module takes stands in its configuration, so the twin has attention modules of its own, and of what
    holds them; all else it shares. The model itself, which other threads may be running, stays as it is.

    Raises:
        DeltaMemError: the ``forward`` of a module that holds attention was replaced, as accelerate does to spread one
            over devices; the twin's would be the module's own.
    """
    attentions = {layer.attention for layer in find_decoder(model).layers}

    def twin(module: Any) -> Any:
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
            made.config._attn_implementation = name
        else:
            made._modules = {place: child and twin(child) for place, child in module._modules.items()}
        return made

    return twin(model)


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all tokens, by plain scores: no sliding window, no soft cap, no sinks."""
    beyond_plain = ("sliding_window", "attn_logit_softcapping", "sinks")
    attentions = [layer.attention for layer in find_decoder(model).layers]
    return all(
        getattr(where, name, None) is None
        for attention in attentions
        for where in (attention, attention.config)
        for name in beyond_plain
    )


def _attend_in_slots(
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
    """query [B, heads, 1, D], key and value whole slots; returns [B, 1, heads, D]."""
    if kwargs.get("s_aux") is not None:
        raise DeltaMemError(f"{type(module).__name__}: decoding in slots doesn't know attention sinks; use generate()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = decode_attention(query[:, :, 0], key, value, attention_mask.view(-1), scale, sliding_window, softcap)
    return out.unsqueeze(1), None


def _attend_after_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    *,
    shared_prefix: KeyValues,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, heads, S, D] without the prefix; returns [B, T, heads, D]."""
    if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
        raise DeltaMemError(f"{type(module).__name__} does more than plain attention: its beginnings can't be shared")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = shared_prefix.layers[module.layer_idx]
    return prefixed_attention(query, *prefix, key, value, attention_mask, scale).transpose(1, 2), None


AttentionInterface.register(SLOTS, _attend_in_slots)
AttentionInterface.register(PREFIXED, _attend_after_prefix)
