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

from deltamem_kernels.paged import paged_scan, paged_step
from deltamem_vllm.adapters import Adapters
from deltamem_vllm.metadata import Choices, MemoryMetadata
from deltamem_vllm.names import BACKEND, OPERATOR
from deltamem_vllm.page import page_size, states_in


class MemoryLayer(nn.Module, MambaBase):
    """Reads and writes the memory of one attention layer.

    Args:
        number: the layer's.
        adapters: whose weights it has.
        hidden: channels of the attention's input.
        name: by which vLLM knows the layer; it ends in ``layers.NUMBER.…``.

    Attributes:
        in_proj: [adapters·4·N·r, hidden], beta_bias: [adapters·N·r], each adapter's as in
            :class:`deltamem.layer.DeltaMemLayer`; zero until loaded.
        reads: [tokens, adapters·N·r] float32 of the pass that runs, between the projections that they steer.
    """

    def __init__(self, number: int, adapters: Adapters, hidden: int, name: str, vllm_config: VllmConfig):
        super().__init__()
        self.number, self.shape, self.name = number, adapters.shape, name
        self.adapters, self.channels = len(adapters.configs), len(adapters.configs) * adapters.shape.width
        self.register_buffer("in_proj", torch.zeros(4 * self.channels, hidden), persistent=False)
        self.register_buffer("beta_bias", torch.zeros(self.channels, dtype=torch.float32), persistent=False)
        self.traced = vllm_config.compilation_config.mode != CompilationMode.NONE
        self.kv_cache = (torch.tensor([]),)
        self.states = torch.tensor([])
        self.reads: Tensor | None = None
        vllm_config.compilation_config.static_forward_context[name] = self

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden], the attention's input → reads [tokens, adapters·N·r] float32."""
        projected = F.linear(x, self.in_proj)
        reads = torch.empty(x.shape[0], self.channels, dtype=torch.float32, device=x.device)
        run = getattr(torch.ops.vllm, OPERATOR) if self.traced else _memory
        run(projected, reads, self.name)
        return reads

    def run(self, projected: Tensor, reads: Tensor, metadata: MemoryMetadata) -> None:
        """The step's sequences: read before write; ``reads`` [tokens, adapters·N·r] is filled."""
        choices = metadata.choices(self.kv_cache[0])
        total = len(choices.adapter)
        if total < len(reads):
            reads[total:] = 0  # padding of a graph's size
            projected, reads = projected[:total], reads[:total]
        if self.adapters == 1:
            self._recur(projected, self.beta_bias, reads, metadata, choices)
        else:
            self._recur_each(projected, reads, metadata, choices)
        if choices.strength is not None:
            reads *= choices.strength

    def _recur_each(self, projected: Tensor, reads: Tensor, metadata: MemoryMetadata, choices: Choices) -> None:
        """Every token by its own adapter, and zeros in its reads beside that one's."""
        width = self.shape.width
        own = torch.arange(len(reads), device=reads.device), choices.adapter
        chosen = projected.unflatten(1, (self.adapters, -1))[own].float()
        chosen[:, -width:] += self.beta_bias.view(-1, width)[choices.adapter]
        found = reads.new_empty(len(reads), width)
        self._recur(chosen, torch.zeros_like(self.beta_bias[:width]), found, metadata, choices)
        reads.zero_().view(-1, self.adapters, width)[own] = found

    def _recur(
        self, projected: Tensor, beta_bias: Tensor, reads: Tensor, metadata: MemoryMetadata, choices: Choices
    ) -> None:
        """projected [tokens, 4·N·r] → reads [tokens, N·r]: those that decode one token, then the prompts."""
        if choices.page_p is None:
            paged_step(projected, beta_bias, self.states, choices.page_d, choices.writes_d, reads)
            return
        decoded = 0
        if choices.page_d is not None:
            decoded = len(choices.page_d)
            paged_step(projected[:decoded], beta_bias, self.states, choices.page_d, choices.writes_d, reads[:decoded])
        paged_scan(
            projected[decoded:], beta_bias, self.states, choices.page_p, metadata.rows, choices.writes_p,
            reads[decoded:],
        )  # fmt: skip

    # --- what vLLM asks a layer with a state

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages."""
        super().bind_kv_cache(kv_cache)
        self.states = states_in(self.kv_cache[0], self.shape)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Of one page."""
        return ((page_size(self.shape),),)

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
