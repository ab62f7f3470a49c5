"""A tiny random chat model with a ChatML tokenizer of one token per byte."""

import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.backbones.random_weights import byte_tokenizer
from tests.conftest import make_tiny_model


def make_chat_model(strategy: str = "tsw", family: str = "llama", seed: int = 0, base=(), **config):
    """(DeltaMemModel in eval mode, tokenizer); the memory steers strongly, so that a mistake in it shows.

    ``base`` overrides the backbone's configuration, ``config`` the adapter's.
    """
    tokenizer = byte_tokenizer()
    base = make_tiny_model(
        family,
        attention="eager" if family.startswith("gemma") else "sdpa",
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **dict(base),
    )
    torch.manual_seed(seed + 1)
    model = get_delta_mem_model(
        base, DeltaMemConfig(strategy=strategy, output_init="random", online_gain=0.5, **config)
    )
    return model.requires_grad_(False).eval(), tokenizer
