"""The arguments that make an engine of vLLM's one with a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from vllm.config import KVTransferConfig

from deltamem.errors import UnsupportedModelError
from deltamem_vllm.names import ADAPTER, CONNECTOR, EXTENSION, FAMILIES, PREFIX


def engine_arguments(base: str, adapter: str | Mapping[str, str], revision: str | None = None) -> dict[str, Any]:
    """What ``vllm.LLM`` and ``AsyncEngineArgs`` need beside the user's own wishes.

    Args:
        base: the backbone, a folder or Hub id.
        adapter: a folder, Hub id or ``models:/…``; of several, by the names that requests choose them by.

    Raises:
        UnsupportedModelError: there is no class with a memory for this backbone.
    """
    config = AutoConfig.from_pretrained(base, revision=revision)
    text = config.get_text_config(decoder=True)
    family = (config.architectures or ["none"])[0].replace("ForConditionalGeneration", "ForCausalLM")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{base} is a {family}; with a memory there are {', '.join(FAMILIES)}. A further decoder is a class of two "
            "lines in deltamem_vllm/models.py"
        )
    overrides: dict[str, Any] = {"architectures": [PREFIX + family]}
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds == {"full_attention"}:
        # vLLM takes a list that names nothing but attention for a model without any other state
        overrides["layer_types"] = None
    return {
        "model": base,
        "revision": revision,
        "hf_overrides": overrides,
        "additional_config": {ADAPTER: adapter if isinstance(adapter, str) else dict(adapter)},
        "kv_transfer_config": KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both"),
        "worker_extension_cls": EXTENSION,
    }
