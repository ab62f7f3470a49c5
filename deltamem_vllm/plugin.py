"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

from deltamem_vllm.names import BACKEND, CONNECTOR, FAMILIES, OPERATOR, PREFIX


def register() -> None:
    """Make the models, their state's backend and the connector known; may be called again."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from deltamem_vllm.checks import MemoryModelConfig

    if BACKEND in MambaAttentionBackendEnum.__members__:
        return
    for family in FAMILIES:
        ModelRegistry.register_model(f"{PREFIX}{family}", f"deltamem_vllm.models:{PREFIX}{family}")
        MODELS_CONFIG_MAP[f"{PREFIX}{family}"] = MemoryModelConfig
    register_backend(BACKEND, "deltamem_vllm.metadata.MemoryBackend", is_mamba=True)
    KVConnectorFactory.register_connector(CONNECTOR, "deltamem_vllm.connector", CONNECTOR)
    CompilationConfig._attention_ops.append(f"vllm::{OPERATOR}")  # where compiled graphs are split


def register_classes() -> None:
    """Name the models by their classes, in a process that starts engines.

    Of models that are named by text, vLLM asks a process of its own, which imports all of vLLM anew: twenty seconds.
    """
    from vllm import ModelRegistry

    from deltamem_vllm import models

    register()
    for family in FAMILIES:
        ModelRegistry.register_model(f"{PREFIX}{family}", getattr(models, f"{PREFIX}{family}"))
