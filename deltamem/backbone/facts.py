"""What a backbone and its tokenizer say about themselves."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNSAID_WINDOW = 4096
"""Tokens, of a backbone whose configuration names no window."""


def computed_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to load weights in: float32 instead of a half precision that a CPU has no instructions for.

    It would emulate them: a product of SmolLM2-135M's size took ninety times as long as in float32.
    """
    if torch.device(device).type != "cpu":
        return dtype
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in supported or supported[dtype]() else torch.float32


def window(config: PreTrainedConfig) -> int:
    """How many tokens a backbone of this configuration can attend to, its keys once made staying good.

    Under longrope that is the length of short texts: keys of longer ones are made with other factors, so a text that
    grows beyond it would have to be read anew.
    """
    said = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or UNSAID_WINDOW
    switch = longrope_switch(config)
    return said if switch is None else min(said, switch)


def longrope_switch(config: PreTrainedConfig) -> int | None:
    """The length beyond which a longrope makes every key with other factors; None for other position encodings."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)


def end_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply: those of the generation configuration, and the tokenizer's own."""
    return frozenset([*as_ids(base.generation_config.eos_token_id), *as_ids(tokenizer.eos_token_id)])


def as_ids(value: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Token ids as transformers' configurations hold them: none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
