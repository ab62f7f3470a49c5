"""How a memory gets into a vLLM decoder: its layers beside the attention, hooks on the projections, its weights."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec

from deltamem.adapters.tensors import INPUTS, tensor_name
from deltamem.errors import AdapterFormatError, UnsupportedModelError
from deltamem_vllm.adapter import adapter_of, layer_numbers
from deltamem_vllm.layer import MemoryLayer
from deltamem_vllm.page import page_size


class WithMemory:
    """Before a vLLM decoder in a class's bases: the same with a memory.

    The decoder's layers have ``self_attn`` with ``qkv_proj`` (queries, keys, values in this order) and ``o_proj``,
    whose output is the attention's, as Llama's have.
    """

    is_hybrid = True
    has_inner_state = True
    supports_mamba_prefix_caching = True
    supports_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **more: Any):
        with _all_attention(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **more)
        self._adapter, self._adapter_tensors = adapter_of(vllm_config)
        self._memories: list[tuple[MemoryLayer, dict[str, _Steer]]] = []
        blocks = self.model.layers
        for number in layer_numbers(self._adapter, len(blocks)):
            attention = getattr(blocks[number], "self_attn", None)
            for name in ("qkv_proj", "o_proj"):
                if not isinstance(getattr(attention, name, None), nn.Module):
                    raise UnsupportedModelError(f"{type(self).__name__}: layer {number} has no self_attn.{name}")
            name = f"{prefix or 'model'}.layers.{number}.self_attn.memory"
            hidden = vllm_config.model_config.get_hidden_size()
            memory = MemoryLayer(number, self._adapter, hidden, name, vllm_config)
            attention.memory = memory
            self._memories.append((memory, _steered(attention, memory)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The backbone's, as ever, then the adapter's."""
        loaded = super().load_weights(weights)
        left = dict(self._adapter_tensors)
        for memory, steered in self._memories:
            _fill(memory, steered, left)
        if left:
            raise AdapterFormatError(f"the adapter has tensors of no layer here: {', '.join(sorted(left)[:3])}, …")
        del self._adapter_tensors
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Of one page."""
        return ((page_size(adapter_of(vllm_config)[0]),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Of one page."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How a page is copied for the next block: whole."""
        return (get_temporal_copy_spec,)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: Iterable[Any]) -> dict[Any, tuple[Any, ...]]:
        """The same by kind of layer; there is one."""
        return {kind: cls.get_mamba_state_copy_func() for kind in mamba_types}


@contextmanager
def _all_attention(config: Any) -> Generator[None]:
    """Inside, a configuration whose kinds of layers were taken away (:mod:`deltamem_vllm.engine`) has them again."""
    taken = getattr(config, "layer_types", ()) is None
    if taken:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    yield
    if taken:
        config.layer_types = None


class _Steer(nn.Module):
    """Adds what was read to features start:stop of a projection's output."""

    def __init__(self, start: int, stop: int, width: int):
        super().__init__()
        self.start, self.stop = start, stop
        self.register_buffer("weight", torch.zeros(width, stop - start), persistent=False)  # transposed

    def forward(self, output: Tensor, reads: Tensor) -> None:
        output[:, self.start : self.stop].addmm_(reads.to(output.dtype), self.weight)


def _steered(attention: nn.Module, memory: MemoryLayer) -> dict[str, _Steer]:
    """Hook the attention's projections; the steered heads' parts by name."""
    q, kv, width = attention.q_size, attention.kv_size, memory.config.width
    places = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "o": (0, memory.in_proj.shape[1])}
    heads = {head: _Steer(*places[head], width) for head in memory.config.steer}
    memory.heads = nn.ModuleDict(heads)  # so that they move with the model
    packed = [heads[head] for head in "qkv" if head in heads]

    def enter(module: nn.Module, args: tuple, output: Any) -> Any:
        memory.reads = memory.forward(args[0])
        for steer in packed:
            steer.forward(output[0], memory.reads)
        return output

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        if "o" in heads:
            heads["o"].forward(output[0], memory.reads)
        memory.reads = None
        return output

    attention.qkv_proj.register_forward_hook(enter)
    attention.o_proj.register_forward_hook(leave)
    return heads


def _fill(memory: MemoryLayer, steered: dict[str, _Steer], tensors: dict[str, Tensor]) -> None:
    """Take a layer's tensors out of ``tensors``.

    Raises:
        AdapterFormatError: one is missing, or has another shape than this backbone needs.
    """
    config = memory.config

    def take(name: str, target: Tensor, scale: float = 1.0) -> None:
        full = tensor_name(memory.number, name)
        tensor = tensors.pop(full, None)
        if tensor is None or tensor.shape != target.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise AdapterFormatError(
                f"the adapter's tensor {full} {found}, this backbone needs {tuple(target.shape)}; is this the backbone "
                "that the adapter was made for?"
            )
        target.copy_(tensor).mul_(scale)

    for name, block in zip(INPUTS, memory.in_proj.split(config.width), strict=True):
        take(name, block)
    take("beta_bias", memory.beta_bias)
    for head, steer in steered.items():
        # α/r is a part of the weight: a power of two in every adapter trained here, so that nothing is rounded
        take(f"delta_{head}_proj", steer.weight.t(), config.scale)
