"""What an engine is refused for before it starts, with the reason."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from deltamem.errors import DeltaMemError
from deltamem_vllm.adapters import adapters_of
from deltamem_vllm.names import CONNECTOR


class MemoryModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for models that have something to say about the engine's configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check it.

        Raises:
            DeltaMemError: it asks for something that a memory can't follow, or doesn't say what is needed.
        """
        check(vllm_config)
        # A token fed in advance would be written before it is known whether its sequence has ended.
        vllm_config.scheduler_config.async_scheduling = False


def check(vllm_config: VllmConfig) -> None:
    """Raise DeltaMemError for what can't be served."""
    for name, config in adapters_of(vllm_config).configs.items():
        if config.strategy == "ssw":
            raise DeltaMemError(
                f"vLLM knows no messages, and the ssw adapter {name} writes one message (or sentence) at a time: serve "
                "it with `deltamem serve` without --engine, or train tsw or msw"
            )
    if vllm_config.lora_config is not None:
        raise DeltaMemError("LoRA beside δ-mem: its layers would bypass the memory; start without --enable-lora")
    if vllm_config.speculative_config is not None:
        raise DeltaMemError(
            "speculative decoding takes tokens back, which a memory can't follow; start without --speculative-config"
        )
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1:
        raise DeltaMemError("δ-mem runs on one device per engine so far: start one engine per device")
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        raise DeltaMemError(
            f"memories come and go by a connector: add --kv-transfer-config "
            f'\'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both"}}\''
        )
