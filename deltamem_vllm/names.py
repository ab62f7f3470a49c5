"""The names by which vLLM knows our parts. Imports nothing, because every process of vLLM's reads it first."""

PREFIX = "DeltaMem"
"""Before a backbone's architecture: the same with a memory."""
FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
"""Architectures of :mod:`deltamem_vllm.models`."""
BACKEND = "DELTAMEM"
CONNECTOR = "DeltaMemConnector"
OPERATOR = "deltamem_memory"
ADAPTER = "deltamem_adapter"
"""Key of vLLM's additional configuration: the adapter's folder, Hub id or address, or several by name."""
REQUEST = "deltamem"
"""Key of a request's kv_transfer_params: what :class:`deltamem_vllm.handover.Handover` says."""
EXTENSION = "deltamem_vllm.worker.KeptMemories"
