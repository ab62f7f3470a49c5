"""One attention layer's memory in vLLM: its weights, and its state in the cache's pages."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from deltamem.config import DeltaMemConfig
from deltamem_kernels.paged import paged_scan, paged_step
from deltamem_vllm.metadata import MemoryMetadata
from deltamem_vllm.names import BACKEND, OPERATOR
from deltamem_vllm.page import page_size, states_in


class MemoryLayer(nn.Module, MambaBase):
    """Reads and writes the memory of one attention layer.

    Args:
        number: the layer's.
        config: the adapter's.
        hidden: channels of the attention's input.
        name: by which vLLM knows the layer; it ends in ``layers.NUMBER.…``.

    Attributes:
        in_proj: [4·N·r, hidden], beta_bias: [N·r], as in :class:`deltamem.layer.DeltaMemLayer`; zero until loaded.
        reads: [tokens, N·r] float32 of the pass that runs, between the projections that they steer.
    """

    def __init__(self, number: int, config: DeltaMemConfig, hidden: int, name: str, vllm_config: VllmConfig):
        super().__init__()
        self.number, self.config, self.name = number, config, name
        self.register_buffer("in_proj", torch.zeros(4 * config.width, hidden), persistent=False)
        self.register_buffer("beta_bias", torch.zeros(config.width, dtype=torch.float32), persistent=False)
        self.traced = vllm_config.compilation_config.mode != CompilationMode.NONE
        self.kv_cache = (torch.tensor([]),)
        self.states = torch.tensor([])
        self.reads: Tensor | None = None
        vllm_config.compilation_config.static_forward_context[name] = self

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden], the attention's input → reads [tokens, N·r] float32, scaled by α/r."""
        projected = F.linear(x, self.in_proj)
        reads = torch.empty(x.shape[0], self.config.width, dtype=torch.float32, device=x.device)
        run = getattr(torch.ops.vllm, OPERATOR) if self.traced else _memory
        run(projected, reads, self.name)
        return reads

    def run(self, projected: Tensor, reads: Tensor, metadata: MemoryMetadata) -> None:
        """The step's sequences: read before write; ``reads`` [tokens, N·r] is filled."""
        pages = self.kv_cache[0]
        choices = metadata.choices(pages)
        decoded = 0 if choices.page_d is None else len(choices.page_d)
        total = decoded + metadata.num_prefill_tokens
        if choices.page_d is not None:
            paged_step(
                projected[:decoded], self.beta_bias, self.states, choices.page_d, choices.writes_d, reads[:decoded]
            )
        if choices.page_p is not None:
            paged_scan(
                projected[decoded:total], self.beta_bias, self.states, choices.page_p, metadata.rows,
                choices.writes_p, reads[decoded:total],
            )  # fmt: skip
        if choices.strength is not None:
            reads[:total] *= choices.strength
        if total < len(reads):
            reads[total:] = 0  # padding of a graph's size

    # --- what vLLM asks a layer with a state

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages."""
        super().bind_kv_cache(kv_cache)
        self.states = states_in(self.kv_cache[0], self.config)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Of one page."""
        return ((page_size(self.config),),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Of one page: memories are float32 whatever the backbone is."""
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Whose metadata it needs."""
        return MambaAttentionBackendEnum[BACKEND]


def _memory(projected: Tensor, reads: Tensor, layer_name: str) -> None:
    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM measures how much memory a pass takes
        reads.zero_()
        return
    layer = context.no_compile_layers[layer_name]
    layer.run(projected, reads, context.attn_metadata[layer_name])


def _memory_traced(projected: Tensor, reads: Tensor, layer_name: str) -> None:
    return None


def _hide_llvmlite() -> None:
    """Let vLLM start engines where numba is loaded.

    It looks at the ``__dict__`` of whatever any module holds, and llvmlite's library has a function for every name.
    """
    if (found := sys.modules.get("llvmlite.binding.ffi")) is not None:
        found.lib._fntab.setdefault("__dict__", {})


_hide_llvmlite()
direct_register_custom_op(op_name=OPERATOR, op_func=_memory, mutates_args=["reads"], fake_impl=_memory_traced)
