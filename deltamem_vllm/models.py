"""vLLM's decoders with a memory; a further one is a class of two lines, and its name in ``names.FAMILIES``."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from deltamem_vllm.steering import WithMemory


class DeltaMemLlamaForCausalLM(WithMemory, LlamaForCausalLM):
    """Llama, and what is built like it."""


class DeltaMemQwen2ForCausalLM(WithMemory, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class DeltaMemQwen3ForCausalLM(WithMemory, Qwen3ForCausalLM):
    """Qwen3."""


class DeltaMemMistralForCausalLM(WithMemory, MistralForCausalLM):
    """Mistral."""


class DeltaMemGemmaForCausalLM(WithMemory, GemmaForCausalLM):
    """Gemma."""


class DeltaMemGemma2ForCausalLM(WithMemory, Gemma2ForCausalLM):
    """Gemma 2."""


class DeltaMemGemma3ForCausalLM(WithMemory, Gemma3ForCausalLM):
    """Gemma 3, its text."""


class DeltaMemPhi3ForCausalLM(WithMemory, Phi3ForCausalLM):
    """Phi-3."""


class _NoRotary(nn.Module):
    """In place of a rotary embedding: positions aren't encoded."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


class DeltaMemSmolLM3ForCausalLM(WithMemory, LlamaForCausalLM):
    """SmolLM3: Llama, with layers that encode no positions (vLLM itself runs it by transformers' code)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for block, rotary in zip(self.model.layers, self.config.no_rope_layers, strict=True):
            if not rotary:
                block.self_attn.rotary_emb = _NoRotary()
