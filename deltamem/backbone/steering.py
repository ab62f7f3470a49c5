"""How a memory enters and leaves one forward pass of the backbone.

The backbone's code is untouched. A :class:`DeltaCall` travels through it as the keyword argument ``delta_call``;
hooks on each attention module take it out again, read and write the layer's state from the module's input, and
add what was read to the outputs of the projections. Without that argument the hooks do nothing at all.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamem.backbone.decoder import Decoder, DecoderLayer, Projection
from deltamem.layer import DeltaMemLayer, Written
from deltamem.segments import Segments


@dataclass
class DeltaCall:
    """One forward pass's memory traffic.

    The states read and the states written are kept apart, so that activation checkpointing, which runs a layer
    twice, reads the same state both times.

    Attributes:
        memory_in: {layer: [B, N, r, r]} before the pass.
        valid: [B, T] bool, tokens that are not padding; None: all.
        segments: what ssw writes; None: token by token.
        write: False reads only.
        memory_out: {layer: [B, N, r, r]} after the pass, filled while it runs.
        written: {layer: what it wrote and with which gates}, filled where it is a dict.
        in_place: single tokens write their states into the tensors of ``memory_in`` (graph capture).
        writes: [B] bool, the sequences whose single token writes; None: all.
    """

    memory_in: dict[int, Tensor]
    valid: Tensor | None = None
    segments: Segments | None = None
    write: bool = True
    memory_out: dict[int, Tensor] = field(default_factory=dict)
    written: dict[int, Written] | None = None
    in_place: bool = False
    writes: Tensor | None = None

    def run(self, index: int, layer: DeltaMemLayer, x: Tensor) -> Tensor:
        """Read and write layer ``index`` given its attention's input x [B, T, hidden]; the reads [B, T, N·r]."""
        before = self.memory_in[index]
        one_token = x.shape[1] == 1 and self.write and self.segments is None
        if one_token and self.written is None and not torch.is_grad_enabled():
            valid = None if self.valid is None else self.valid[:, 0]
            reads, after = layer.step(x, before, valid, before if self.in_place else None, self.writes)
        else:
            reads, after, written = layer(layer.project(x), before, self.valid, self.segments, self.write)
            if torch.is_grad_enabled():
                reads = layer.scaled(reads, x.dtype)
            if self.written is not None:
                self.written[index] = written
        self.memory_out[index] = after
        return reads


# What the projection hooks of the attention module now running add; set and cleared by that module's own hooks.
# A ContextVar and no plain global, and nothing on the module: threads run one backbone at the same time (a server's
# turns, a checkpointed backward pass, which autograd runs on threads of its own), and each must steer with its own
# reads.
_now: ContextVar[tuple[DeltaMemLayer, Tensor] | None] = ContextVar("deltamem_steering", default=None)


def attach(decoder: Decoder, memory_layers: dict[int, DeltaMemLayer]) -> list[RemovableHandle]:
    """Register the hooks on every attention module of the backbone; the handles take them off again."""
    handles = []
    for index, layer in enumerate(decoder.layers):
        memory_layer = memory_layers.get(index)
        enter = _enter(index, memory_layer)
        handles.append(layer.attention.register_forward_pre_hook(enter, with_kwargs=True))
        if memory_layer is None:
            continue
        handles.append(layer.attention.register_forward_hook(_leave, always_call=True))
        for head in memory_layer.steer:
            projection = layer.projections[head]
            handles.append(projection.module.register_forward_hook(_steer(head, projection)))
    return handles


def _enter(index: int, memory_layer: DeltaMemLayer | None):
    def before_attention(module: nn.Module, args: tuple, kwargs: dict):
        call: DeltaCall | None = kwargs.pop("delta_call", None)
        if call is not None and memory_layer is not None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            _now.set((memory_layer, call.run(index, memory_layer, x)))
        return args, kwargs

    return before_attention


def _leave(module: nn.Module, args: tuple, output) -> None:
    _now.set(None)


def _steer(head: str, projection: Projection):
    def after_projection(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        now = _now.get()
        if now is None:
            return output
        memory_layer, reads = now
        if projection.whole:
            return memory_layer.steered(head, output, reads)
        part = output[..., projection.start : projection.stop]
        steered = memory_layer.steered(head, part, reads)
        if steered is part:
            return output
        return torch.cat([output[..., : projection.start], steered, output[..., projection.stop :]], dim=-1)

    return after_projection


class _WriteOnly(nn.Module):
    """Stands in for the last layer of a write pass: its memory is written, its attention and MLP don't run."""

    def __init__(self, index: int, layer: DecoderLayer, memory_layer: DeltaMemLayer):
        super().__init__()
        self.index = index
        # plain attributes: the modules belong to the backbone and to the adapter
        self.parts = (layer.input_norm, memory_layer)

    def forward(self, hidden_states: Tensor, *args, delta_call: DeltaCall, **kwargs) -> Tensor:
        input_norm, memory_layer = self.parts
        delta_call.run(self.index, memory_layer, input_norm(hidden_states))
        return hidden_states


def write_trunk(decoder: Decoder, memory_layers: dict[int, DeltaMemLayer]) -> nn.Module:
    """The backbone's trunk, cut after the last layer that has a memory; it shares all its modules."""
    last = max(memory_layers)
    trunk = copy.copy(decoder.trunk)
    trunk._modules = dict(decoder.trunk._modules)
    blocks = [layer.module for layer in decoder.layers[:last]]
    trunk.layers = nn.ModuleList([*blocks, _WriteOnly(last, decoder.layers[last], memory_layers[last])])
    if isinstance(getattr(trunk, "norm", None), nn.Module):
        trunk.norm = nn.Identity()
    return trunk
