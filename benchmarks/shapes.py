"""The paper's backbones as configurations with random weights: for time and memory, not for answers."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipelines.errors import StageError

SHAPES = {
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 262144,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False, "max_position_embeddings": 40960,
    },
    "smollm3-3b": {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 65536, "pad_token_id": 0,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 2,
    },
    "tiny": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "max_position_embeddings": 262144,
    },
}  # fmt: skip
SHAPE_NAMES = ", ".join(SHAPES)


def known_shapes(value: str | list[str]) -> str | list[str]:
    """An option's value, one name or several. Raises typer.BadParameter where a shape isn't there."""
    for name in [value] if isinstance(value, str) else value:
        if name not in SHAPES:
            raise typer.BadParameter(f"no shape of the name {name}; there are {SHAPE_NAMES}")
    return value


def backbone_of(base: str | None, shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The backbone in a folder; without one, random weights of a shape. Raises StageError where there is no folder."""
    if base is None:
        return random_backbone(shape, device).to(dtype)
    if not Path(base).is_dir():
        raise StageError(f"--base {base}: there is no such folder")
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()


def random_backbone(shape: str, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """A frozen bf16 model of a real shape, initialised on the device."""
    torch.manual_seed(0)
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.requires_grad_(False).eval()
