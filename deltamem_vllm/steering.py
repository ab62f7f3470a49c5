"""How a memory gets into a vLLM decoder: its layers beside the attention, hooks on the projections, its weights.

Several adapters' weights lie side by side, so that a pass is the same few products however many there are: tokens are
projected for all adapters, the memory takes each token's own, and what it reads steers through the token's own weights,
since beside it there are zeros for all others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec

from deltamem.adapters.names import INPUTS, NORM_LIMIT, tensor_name
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError, UnsupportedModelError
from deltamem_vllm.adapters import adapters_of
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
        self._adapters = adapters_of(vllm_config)
        self._memories: list[tuple[MemoryLayer, dict[str, _Steer]]] = []
        for number in self._adapters.layers:
            attention = getattr(self.model.layers[number], "self_attn", None)
            for name in ("qkv_proj", "o_proj"):
                if not isinstance(getattr(attention, name, None), nn.Module):
                    raise UnsupportedModelError(f"{type(self).__name__}: layer {number} has no self_attn.{name}")
            name = f"{prefix or 'model'}.layers.{number}.self_attn.memory"
            hidden = vllm_config.model_config.get_hidden_size()
            memory = MemoryLayer(number, self._adapters, hidden, name, vllm_config)
            attention.memory = memory
            self._memories.append((memory, _steered(attention, memory)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The backbone's, as ever, then the adapters'."""
        loaded = super().load_weights(weights)
        for adapter, (name, config) in enumerate(self._adapters.configs.items()):
            left = dict(self._adapters.tensors[adapter])
            for memory, steered in self._memories:
                _fill(memory, steered, adapter, config, left)
            if left:
                raise AdapterFormatError(f"{name} has tensors of no layer here: {', '.join(sorted(left)[:3])}, …")
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Of one page."""
        return ((page_size(adapters_of(vllm_config).shape),),)

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
    """Adds what was read to features start:stop of a projection's output.

    Attributes:
        weight: [adapters·N·r, stop - start], transposed; zero until loaded.
    """

    def __init__(self, start: int, stop: int, channels: int):
        super().__init__()
        self.start, self.stop = start, stop
        self.register_buffer("weight", torch.zeros(channels, stop - start), persistent=False)

    def forward(self, output: Tensor, reads: Tensor) -> None:
        output[:, self.start : self.stop].addmm_(reads.to(output.dtype), self.weight)


def _steered(attention: nn.Module, memory: MemoryLayer) -> dict[str, _Steer]:
    """Hook the attention's projections; the steered heads' parts by name."""
    q, kv = attention.q_size, attention.kv_size
    places = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "o": (0, memory.in_proj.shape[1])}
    heads = {head: _Steer(*places[head], memory.channels) for head in memory.shape.steer}
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


def _fill(
    memory: MemoryLayer, steered: dict[str, _Steer], adapter: int, config: DeltaMemConfig, tensors: dict[str, Tensor]
) -> None:
    """Take a layer's tensors out of ``tensors``, to the adapter's place among all.

    Raises:
        AdapterFormatError: one is missing, has another shape than this backbone needs, or isn't finite.
    """
    adapters, width = memory.adapters, memory.shape.width

    def take(name: str, target: Tensor, scale: float = 1.0) -> None:
        full = tensor_name(memory.number, name)
        tensor = tensors.pop(full, None)
        if tensor is None or tensor.shape != target.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise AdapterFormatError(
                f"the adapter's tensor {full} {found}, this backbone needs {tuple(target.shape)}; is this the backbone "
                "that the adapter was made for?"
            )
        if not bool(tensor.isfinite().all()):  # zero times infinity would reach the other adapters' tokens
            raise AdapterFormatError(f"the adapter's tensor {full} holds numbers that aren't finite")
        target.copy_(tensor).mul_(scale)

    for name, block in zip(INPUTS, memory.in_proj.unflatten(0, (adapters, 4, width))[adapter], strict=True):
        take(name, block[: config.width])
    tensors.pop(tensor_name(memory.number, NORM_LIMIT), None)  # the memories are limited as they come
    take("beta_bias", memory.beta_bias.view(adapters, width)[adapter, : config.width])
    for head in config.steer:
        # α/r is a part of the weight: a power of two in every adapter trained here, so that nothing is rounded
        weight = steered[head].weight.unflatten(0, (adapters, width))[adapter, : config.width]
        take(f"delta_{head}_proj", weight.t(), config.scale)
