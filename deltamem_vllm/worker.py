"""What is asked of a worker by ``collective_rpc``: the memories that it has kept."""

from __future__ import annotations

from vllm.distributed.kv_transfer import get_kv_transfer_group


class KeptMemories:
    """vLLM puts this class among the bases of its worker (``worker_extension_cls``)."""

    def take_memory(self, key: str) -> bytes | None:
        """The memory that was kept under a key, once; None: not there (yet)."""
        return get_kv_transfer_group().kept.pop(key, None)
