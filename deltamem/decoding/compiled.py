"""A slot decoder's layers as compiled programs: the same few kernels for every layer, and each weight read once.

Written out in PyTorch, a layer of one token is about fifty kernels, most of which take longer to start than to run.
``torch.compile`` makes a dozen of them: norms, rotary embeddings, the write into the slots, the gated activation and
the steering run inside their neighbours. Layers hand their weights, slots and states in as inputs, so that all of one
kind share one program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from deltamem.backbone.decoder import DecoderLayer, find_decoder
from deltamem.backbone.steering import DeltaCall, without_hooks
from deltamem.decoding.attention import SLOTS, with_attention
from deltamem.decoding.slots import LayerSlots, SlotCache
from deltamem.layer import DeltaMemLayer, MemoryLayers
from deltamem_kernels import row_products, state_step
from deltamem_kernels.device import MOST_WEIGHTS, kernels_chosen

PROGRAMS = 64
"""Most programs kept: layers of different kinds, with and without a memory, times one row and several."""

INDUCTOR = {"force_pointwise_cat": True}
"""The compiler's settings: the halves that rotary embeddings exchange are read where they lie, not copied first."""


def with_compiled_layers(model: PreTrainedModel, memory_layers: MemoryLayers | None) -> PreTrainedModel:
    """A twin of the backbone for one token in slots, whose layers are compiled when they first run.

    Args:
        memory_layers: the adapter's, whose calls it takes; their weights are taken as they are now.

    Raises:
        DeltaMemError: as :func:`deltamem.decoding.attention.with_attention`.
    """
    twin = with_attention(model, SLOTS)
    decoder = find_decoder(twin)
    memories = {} if memory_layers is None else dict(memory_layers.items())
    layers = [_Layer(i, layer, memories.get(str(i)), twin.dtype) for i, layer in enumerate(decoder.layers)]
    decoder.trunk._modules["layers"] = nn.ModuleList(layers)
    return twin


class _Layer(nn.Module):
    """Stands in for a decoder layer and hands it its own part of the slots and of the call."""

    def __init__(self, index: int, layer: DecoderLayer, memory: DeltaMemLayer | None, dtype: torch.dtype):
        super().__init__()
        attention: Any = without_hooks(layer.attention)
        attention.layer_idx = 0  # the number would make each layer a program of its own; its slots are handed in
        if memory is not None:
            attention = _SteeredAttention(attention, layer, memory, dtype)
        inside = layer.module._modules.items()
        layer.module._modules = {name: attention if child is layer.attention else child for name, child in inside}
        self.index, self.block, self.has_memory = index, layer.module, memory is not None

    def forward(
        self, hidden_states: Tensor, *, past_key_values: SlotCache, delta_call: DeltaCall | None = None, **options: Any
    ) -> Tensor:
        if self.has_memory and delta_call is not None:
            state = delta_call.memory_in[self.index]
            options["traffic"] = (state, delta_call.writes, delta_call.strength)
        return _compiled()(self.block, hidden_states, past_key_values.layer(self.index), options)


class _Reads:
    """What the projections of the layer now running add."""

    def __init__(self) -> None:
        self.now: Tensor | None = None


class _SteeredAttention(nn.Module):
    """An attention module with its memory: :mod:`deltamem.backbone.steering`, as a compiler can read it."""

    def __init__(self, attention: nn.Module, layer: DecoderLayer, memory: DeltaMemLayer, dtype: torch.dtype):
        super().__init__()
        self.attention, self.reads = attention, _Reads()
        self.in_proj = memory.in_proj.detach().to(dtype)
        self.beta_bias = memory.beta_bias.detach()
        steered: dict[nn.Module, list[tuple[int, int, Tensor]]] = {}
        for head, weight in memory.steer.items():
            projection = layer.projections[head]
            steered.setdefault(projection.module, []).append(
                (projection.start, projection.stop, weight.detach().t().contiguous())
            )
        for name, child in attention._modules.items():
            if child in steered:
                attention._modules[name] = _Steered(without_hooks(child), steered[child], memory.scale, self.reads)

    def forward(self, *args: Any, hidden_states: Tensor, traffic: tuple[Any, ...], **options: Any) -> Any:
        state, writes, strength = traffic
        projected = F.linear(hidden_states, self.in_proj)[:, 0]
        reads = state_step(projected, self.beta_bias, state, writes)
        self.reads.now = reads * strength[:, None] if isinstance(strength, Tensor) else reads
        out = self.attention(*args, hidden_states=hidden_states, **options)
        self.reads.now = None
        return out


class _Steered(nn.Module):
    """A projection whose output is steered: output[start:stop] += (α/r) · W_Δ · reads, for each part.

    Args:
        parts: start, stop and W_Δᵀ [N·r, stop - start], which neighbouring outputs read side by side.
    """

    def __init__(self, module: nn.Module, parts: list[tuple[int, int, Tensor]], scale: float, reads: _Reads):
        super().__init__()
        self.module, self.parts, self.scale, self.reads = module, parts, scale, reads

    def forward(self, x: Tensor) -> Tensor:
        out, reads = self.module(x), cast(Tensor, self.reads.now)
        pieces, done = [], 0
        for start, stop, weight in self.parts:
            # a product and a sum, not a matrix product: the compiler makes them part of what reads the result
            added = (reads[:, :, None] * weight.float()).sum(1)[:, None]
            steered = (out[..., start:stop].float() + self.scale * added).to(out.dtype)
            pieces += [out[..., done:start], steered]
            done = stop
        pieces = [piece for piece in (*pieces, out[..., done:]) if piece.shape[-1]]
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def _step(block: nn.Module, hidden_states: Tensor, slots: LayerSlots, options: dict[str, Any]) -> Tensor:
    return block(hidden_states, past_key_values=slots, **options)


@cache
def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.assume_constant_result(kernels_chosen)
    step = torch.compile(_step, backend=_backend)
    return torch._dynamo.config.patch(recompile_limit=PROGRAMS)(step)


def _backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable:
    from torch._inductor.compile_fx import compile_fx  # seconds to import

    join_products(graph.graph)
    graph.recompile()
    return cast(Callable, compile_fx(graph, inputs, config_patches=INDUCTOR))


def join_products(graph: fx.Graph) -> None:
    """Products of one row by several weights, as queries, keys, values and memory are, become one launch."""
    of_row: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.linear and _is_row_product(*node.args[:2]):
            of_row.setdefault(node.args[0], []).append(node)
    for products in of_row.values():
        for start in range(0, len(products), MOST_WEIGHTS):
            _join(graph, products[start : start + MOST_WEIGHTS])


def _is_row_product(x: fx.Node, weight: fx.Node) -> bool:
    row, matrix = x.meta["example_value"], weight.meta["example_value"]
    one_row = all(isinstance(size, int) and size == 1 for size in row.shape[:-1])
    return one_row and weight.op == "placeholder" and matrix.dtype == row.dtype and matrix.is_contiguous()


def _join(graph: fx.Graph, products: list[fx.Node]) -> None:
    row = products[0].args[0]  # not what it was when they were found: that may have been joined itself
    with graph.inserting_before(products[0]):
        joined = graph.call_function(row_products, (row, [product.args[1] for product in products]))
        for place, product in enumerate(products):
            part = graph.call_function(operator.getitem, (joined, place))
            bias = product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")
            if bias is not None:
                part = graph.call_function(operator.add, (part, bias))
            product.replace_all_uses_with(part)
    for product in products:
        graph.erase_node(product)
