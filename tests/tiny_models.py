"""Tiny random models and their tokenizers: the one place that tests take them from."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.backbones.random_weights import byte_tokenizer

FAMILIES = ["qwen3", "smollm3", "llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_FAMILY = {
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 4096},
    "gemma3_text": {"sliding_window": 4096},
}


def make_tiny_model(family: str = "qwen3", attention: str = "eager", seed: int = 0, tokenizer=None, **overrides):
    """A random 3-layer model of ``family`` in float32 with weights large enough to tell errors from noise.

    With a ``tokenizer`` it has that one's vocabulary and special tokens.
    """
    torch.manual_seed(seed)
    vocabulary = {}
    if tokenizer is not None:
        vocabulary = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        vocabulary["vocab_size"] = len(tokenizer)
    config = AutoConfig.for_model(family, **{**SIZES, **OF_FAMILY.get(family, {}), **vocabulary, **overrides})
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def make_chat_model(strategy: str = "tsw", family: str = "llama", seed: int = 0, base=(), **config):
    """(DeltaMemModel in eval mode, ChatML tokenizer of one token per byte).

    The memory steers strongly, so that a mistake in it shows. ``base`` overrides the backbone's configuration,
    ``config`` the adapter's.
    """
    tokenizer = byte_tokenizer()
    attention = "eager" if family.startswith("gemma") else "sdpa"
    base = make_tiny_model(family, attention, tokenizer=tokenizer, **dict(base))
    torch.manual_seed(seed + 1)
    model = get_delta_mem_model(
        base, DeltaMemConfig(strategy=strategy, output_init="random", online_gain=0.5, **config)
    )
    return model.requires_grad_(False).eval(), tokenizer


def plain_byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte and no special ones, so that a position among the tokens is one in an ASCII text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
