"""Tiny random backbones of every supported family, and the markers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
EXTRAS = {
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 4096},
    "gemma3_text": {"sliding_window": 4096},
}
FAMILIES = ["qwen3", "smollm3", "llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"]


def make_tiny_model(family: str = "qwen3", attention: str = "eager", seed: int = 0, **overrides):
    """A random 3-layer model of ``family`` in float32 with weights large enough to tell errors from noise."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **EXTRAS.get(family, {}), **overrides})
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture
def tiny_model():
    return make_tiny_model


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
