"""What a backbone and its tokenizer say about themselves."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNSAID_WINDOW = 4096
"""Tokens, of a backbone whose configuration names no window."""


def window(config: PreTrainedConfig) -> int:
    """How many tokens a backbone of this configuration can attend to."""
    said = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return said or UNSAID_WINDOW


def end_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a reply: those of the generation configuration, and the tokenizer's own."""
    return frozenset([*as_ids(base.generation_config.eos_token_id), *as_ids(tokenizer.eos_token_id)])


def as_ids(value: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Token ids as transformers' configurations hold them: none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
