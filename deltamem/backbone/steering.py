"""How a memory enters and leaves one forward pass of the backbone.

The backbone's code is untouched. A :class:`DeltaCall` travels through it as the keyword argument ``delta_call``;
hooks on each attention module take it out again, read and write the layer's state from the module's input, and
add what was read to the outputs of the projections. Without that argument the hooks do nothing at all.

Several adapters may hook one backbone: each call says whose it is, and the hooks of the others let it pass.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltamem.backbone.decoder import Decoder, DecoderLayer, Projection
from deltamem.layer import DeltaMemLayer, MemoryLayers, Written
from deltamem.segments import Segments


@dataclass
class DeltaCall:
    """One forward pass's memory traffic.

    The states read and the states written are kept apart, so that activation checkpointing, which runs a layer
    twice, reads the same state both times.

    Attributes:
        layers: the adapter's, by their numbers as text: whose call this is.
        memory_in: {layer: [B, N, r, r]} before the pass.
        valid: [B, T] bool, tokens that are not padding; None: all.
        segments: what ssw writes; None: token by token.
        write: False reads only.
        strength: factor of what is read; 0 is the frozen backbone, exactly. A number, or [B] float32.
        memory_out: {layer: [B, N, r, r]} after the pass, filled while it runs.
        written: {layer: what it wrote and with which gates}, filled where it is a dict.
        in_place: single tokens write their states into the tensors of ``memory_in`` (graph capture).
        writes: [B] bool, the sequences whose single token writes; None: all.
    """

    layers: MemoryLayers
    memory_in: dict[int, Tensor]
    valid: Tensor | None = None
    segments: Segments | None = None
    write: bool = True
    strength: float | Tensor = 1.0
    memory_out: dict[int, Tensor] = field(default_factory=dict)
    written: dict[int, Written] | None = None
    in_place: bool = False
    writes: Tensor | None = None

    def run(self, index: int, layer: DeltaMemLayer, x: Tensor) -> Tensor | None:
        """Read and write layer ``index``.

        Args:
            x: [B, T, hidden], the input of its attention.

        Returns:
            What steers, [B, T, N·r]; None where nothing does.
        """
        before = self.memory_in[index]
        one_token = x.shape[1] == 1 and self.write and self.segments is None
        if one_token and self.written is None and not torch.is_grad_enabled():
            valid = None if self.valid is None else self.valid[:, 0]
            reads, after = layer.step(x, before, valid, before if self.in_place else None, self.writes)
        else:
            reads, after, written = layer(layer.project(x), before, self.valid, self.segments, self.write)
            if self.written is not None:
                self.written[index] = written
        self.memory_out[index] = after
        if isinstance(self.strength, Tensor):
            reads = reads * self.strength[:, None, None]
        elif self.strength == 0:
            return None
        elif self.strength != 1:
            reads = reads * self.strength
        return layer.scaled(reads, x.dtype) if torch.is_grad_enabled() else reads


# What the projection hooks of the attention module now running add; set and cleared by that module's own hooks.
# A ContextVar and no plain global, and nothing on the module: several threads may run one backbone at the same time
# (a server's, and autograd's own, which run a checkpointed layer again), and each steers with its own reads.
_now: ContextVar[tuple[DeltaMemLayer, Tensor] | None] = ContextVar("deltamem_steering", default=None)


def attach(decoder: Decoder, memory_layers: MemoryLayers) -> list[RemovableHandle]:
    """Register the hooks on every attention module of the backbone; the handles take them off again."""
    handles = []
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.attention.register_forward_pre_hook(_Enter(index, memory_layers), with_kwargs=True))
        if str(index) not in memory_layers:
            continue
        handles.append(layer.attention.register_forward_hook(_leave, always_call=True))
        memory_layer = memory_layers[str(index)]
        for head in memory_layer.steer:
            projection = layer.projections[head]
            handles.append(projection.module.register_forward_hook(_Steer(memory_layer, head, projection)))
    return handles


# Hooks are objects with attributes and no closures, so that copy.deepcopy of a model copies what they hold, too.


@dataclass(frozen=True)
class _Enter:
    """Before an attention module: takes out this adapter's call, reads and writes."""

    index: int
    memory_layers: MemoryLayers

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        call: DeltaCall | None = kwargs.get("delta_call")
        if call is None or call.layers is not self.memory_layers:
            return args, kwargs
        kwargs = {name: value for name, value in kwargs.items() if name != "delta_call"}
        if str(self.index) in self.memory_layers:
            layer = self.memory_layers[str(self.index)]
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            reads = call.run(self.index, layer, x)
            _now.set(None if reads is None else (layer, reads))
        return args, kwargs


def _leave(module: nn.Module, args: tuple, output) -> None:
    _now.set(None)


@dataclass(frozen=True)
class _Steer:
    """After a projection: adds what was read to its output."""

    memory_layer: DeltaMemLayer
    head: str
    projection: Projection

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        now = _now.get()
        if now is None or now[0] is not self.memory_layer:
            return output
        memory_layer, reads = now
        projection = self.projection
        if projection.whole:
            return memory_layer.steered(self.head, output, reads)
        part = output[..., projection.start : projection.stop]
        steered = memory_layer.steered(self.head, part, reads)
        if steered is part:
            return output
        return torch.cat([output[..., : projection.start], steered, output[..., projection.stop :]], dim=-1)


def has_other_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward`` and what :func:`attach` adds, of any adapter."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(map(_is_ours, hooks)) or "forward" in vars(module)


def _is_ours(hook: object) -> bool:
    return hook is _leave or isinstance(hook, _Enter | _Steer)


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy of a module that shares all it holds, but for the hooks that :func:`attach` registers, of any adapter."""
    made = copy.copy(module)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        kept = {key: hook for key, hook in getattr(module, name).items() if not _is_ours(hook)}
        setattr(made, name, OrderedDict(kept))
    made._modules = dict(module._modules)
    return made


class _WriteOnly(nn.Module):
    """Stands in for the last layer of a write pass: its memory is written, its attention and MLP don't run."""

    def __init__(self, index: int, layer: DecoderLayer, memory_layer: DeltaMemLayer):
        super().__init__()
        self.index = index
        # a tuple: the modules belong to the backbone and to the adapter
        self.parts = (layer.input_norm, memory_layer)

    def forward(self, hidden_states: Tensor, *args, delta_call: DeltaCall, **kwargs) -> Tensor:
        input_norm, memory_layer = self.parts
        delta_call.run(self.index, memory_layer, input_norm(hidden_states))
        return hidden_states


def write_trunk(decoder: Decoder, memory_layers: MemoryLayers) -> nn.Module:
    """The backbone's trunk, cut after the last layer that has a memory; it shares all its modules.

    It is made for each pass, which takes no time to speak of: one that was kept would miss what is replaced in the
    backbone later (embeddings that were resized, say).
    """
    last = max(int(index) for index in memory_layers)
    trunk = copy.copy(decoder.trunk)
    trunk._modules = dict(decoder.trunk._modules)
    blocks = [layer.module for layer in decoder.layers[:last]]
    trunk.layers = nn.ModuleList([*blocks, _WriteOnly(last, decoder.layers[last], memory_layers[str(last)])])
    if isinstance(getattr(trunk, "norm", None), nn.Module):
        trunk.norm = nn.Identity()
    return trunk
