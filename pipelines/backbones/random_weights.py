"""Backbones with seeded random weights: for tests, and for timing shapes whose weights aren't at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipelines.config.backbones import RandomBackbone
from pipelines.errors import StageError

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def fetch(spec: RandomBackbone, folder: Path) -> str:
    """Draws the weights as the architecture initialises them; returns the seed it was done with."""
    tokenizer = _tokenizer(spec)
    config = _config(spec, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
        except ValueError as error:
            raise StageError(
                f"architecture: {config.model_type!r} is not a causal language model of transformers. Choose "
                "a decoder's model_type, such as llama or qwen3."
            ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"seed {spec.seed}"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token per byte of UTF-8, three special ones, and the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHATML
    )


def _tokenizer(spec: RandomBackbone) -> PreTrainedTokenizerBase:
    if spec.tokenizer is None:
        return byte_tokenizer()
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(spec.tokenizer))
    except (OSError, ValueError) as error:
        raise StageError(f"tokenizer: {spec.tokenizer} can't be loaded: {error}") from error


def _config(spec: RandomBackbone, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    from_tokenizer: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = AutoConfig.for_model(**{**from_tokenizer, **spec.architecture})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise StageError(f"architecture: transformers can't use it: {error}") from error
    if config.vocab_size < len(tokenizer):
        raise StageError(
            f"architecture.vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens. "
            "Leave vocab_size out to take the tokenizer's."
        )
    return config
