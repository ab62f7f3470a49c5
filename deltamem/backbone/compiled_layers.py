"""Whole decoder layers with their memory as compiled programs, for training.

Written out in PyTorch, a layer and its gradient are about a hundred kernels; where the backbone is small, most take
longer to start than to run. Compiled, norms, rotary embeddings, steering, residuals and casts run inside their
neighbours, and matrix products, attention and the recurrence are what is left. A layer hands its weights in as inputs,
so that all layers of one kind share one program.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem.backbone.acceleration import compile_norms_and_mlps
from deltamem.backbone.decoder import DecoderLayer, find_decoder
from deltamem.backbone.no_cache import NoCache
from deltamem.backbone.steering import DeltaCall, has_other_hooks, without_hooks
from deltamem.layer import DeltaMemLayer, Written
from deltamem_kernels.device import chosen_backend, kernels_chosen

log = logging.getLogger("deltamem.backbone")

PROGRAMS = 64
"""Most programs kept: layers of different kinds, written or read, with and without gradients of what comes in."""

ATTENTION = ("sdpa", "eager")
"""Attention functions that a compiler can read."""


def compile_backbone(model: PreTrainedModel, how: bool | str) -> None:
    """Compile what ``train.compile_backbone`` says: norms and MLPs (True), whole layers ("layers"), nothing (False)."""
    if how:
        (compile_layers if how == "layers" else compile_norms_and_mlps)(model)


def compile_layers(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Compile the backbone in place for training; returns the model.

    A layer that a memory passes through with gradients runs as one program, forward and backward. Where it can't (by
    segment, under activation checkpointing, with other hooks, by another attention function, or where the compiler
    fails) its norms and MLPs are what is compiled, and the log says why, once.

    Args:
        **options: of ``torch.compile``. Shapes are dynamic unless these say otherwise: batches differ in length.
    """
    compile_norms_and_mlps(model, **options)
    programs = _Programs({"dynamic": True, **options})
    for index, layer in enumerate(find_decoder(model).layers):
        layer.module._compiled_call_impl = _CompiledLayer(index, layer, programs)  # where Module.compile puts it
    return model


class _Programs:
    """The compiled programs of a model's layers."""

    def __init__(self, options: dict[str, Any]):
        for known in (kernels_chosen, chosen_backend):  # once and for all
            torch._dynamo.assume_constant_result(known)
        # the scan's workspace is of a size that only it knows where lengths are symbols
        settings = {"recompile_limit": PROGRAMS, "capture_dynamic_output_shape_ops": True}
        self._run = torch._dynamo.config.patch(settings)(torch.compile(_run, fullgraph=True, **options))
        self._told: set[str] = set()
        self.usable = True

    def __call__(self, *args: Any) -> _Ran | None:
        """What ``_run`` returns; None if it can't be compiled."""
        from torch._dynamo.exc import TorchDynamoException  # seconds to import

        try:
            return self._run(*args)
        except TorchDynamoException as error:
            self.usable = False
            first, *_ = str(error).strip().split("\n\n")
            self.tell(f"{type(error).__name__}: {' '.join(first.split())}")
            return None

    def tell(self, reason: str) -> None:
        """Log, once, why the layers run as they are."""
        if reason not in self._told:
            log.warning("only norms and MLPs are compiled, not whole layers: %s", reason)
        self._told.add(reason)


class _CompiledLayer:
    """What calling a decoder layer does: run its program where it can, or else the layer as it is."""

    def __init__(self, index: int, layer: DecoderLayer, programs: _Programs):
        self._index, self._layer, self._programs = index, layer, programs
        self._modules = tuple(layer.module.modules())
        self._block: _Block | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        call: DeltaCall | None = options.get("delta_call")
        if call is not None and len(args) < 2 and torch.is_grad_enabled() and self._programs.usable:
            ran = self._run(call, *args, **options)
            if ran is not None:
                return ran.output
        return self._layer.module._call_impl(*args, **options)

    def _run(self, call: DeltaCall, hidden_states: Tensor, **options: Any) -> _Ran | None:
        if reason := self._obstacle(call, options.get("past_key_values")):
            self._programs.tell(reason)
            return None
        self._block = self._block or _Block(self._layer)
        memory = call.layers[str(self._index)] if str(self._index) in call.layers else None
        state = call.memory_in.get(self._index)
        if not hidden_states.requires_grad:  # the first layer; with a gradient it shares the others' program
            hidden_states = hidden_states.detach().requires_grad_()
        options = {name: value for name, value in options.items() if name not in ("delta_call", "past_key_values")}
        traffic = None if memory is None else (memory, state, call.valid, call.write)
        ran = self._programs(self._block, hidden_states, traffic, options)
        if ran is not None and memory is not None and state is not None:
            call.memory_out[self._index] = ran.after if ran.after is not None else state
            if call.written is not None and ran.projected is not None:
                call.written[self._index] = Written(memory.gates(ran.projected), call.valid)
        return ran

    def _obstacle(self, call: DeltaCall, cache: Any) -> str | None:
        block, config = self._layer.module, cast(Any, self._layer.attention).config
        if call.layers.limited:
            return "the norms of its states are limited, in parts of a length that a program would have to know"
        if call.segments is not None:
            return "ssw writes as many segments as a batch happens to have"
        if isinstance(call.strength, Tensor) or call.strength != 1:
            return "what is read is scaled"
        if cache is not None and not isinstance(cache, NoCache):
            return "there is a KV cache"
        if block.training and getattr(block, "gradient_checkpointing", False):
            return "activations are computed again (activation checkpointing)"
        if config._attn_implementation not in ATTENTION:
            return f"attention is {config._attn_implementation}, not {' or '.join(ATTENTION)}"
        modules = tuple(block.modules())
        if modules != self._modules:
            return "modules of it were replaced after it was compiled"
        for module in modules:
            if has_other_hooks(module):
                return f"{type(module).__name__} has hooks of others, or a forward of its own"
        return None


class _Ran(NamedTuple):
    """What a layer returns, its memory's projection [B, T, 4·N·r] and the state after; None where it didn't write."""

    output: Any
    projected: Tensor | None
    after: Tensor | None


class _Traffic:
    """What the attention of the layer now running has made of its memory."""

    def __init__(self) -> None:
        self.memory: DeltaMemLayer | None = None
        self.reads: Tensor | None = None
        self.projected: Tensor | None = None
        self.after: Tensor | None = None


class _Block(nn.Module):
    """A decoder layer of shared weights, whose attention reads and writes as a compiler can follow."""

    def __init__(self, layer: DecoderLayer):
        super().__init__()
        self.traffic = _Traffic()
        steered: dict[nn.Module, list[tuple[str, int, int]]] = {}
        for head, projection in layer.projections.items():
            steered.setdefault(projection.module, []).append((head, projection.start, projection.stop))

        def twin(module: nn.Module) -> nn.Module:
            made: Any = without_hooks(module)
            made._modules = {name: child and twin(child) for name, child in module._modules.items()}
            if module is layer.attention:
                made.layer_idx = 0  # the number would make each layer a program of its own
                return _SteeredAttention(made, self.traffic)
            return _Steered(made, steered[module], self.traffic) if module in steered else made

        self.block = twin(layer.module)

    def forward(self, hidden_states: Tensor, traffic: tuple | None, options: dict[str, Any]) -> _Ran:
        output = self.block(hidden_states, **options, traffic=traffic)
        ran = _Ran(output, self.traffic.projected, self.traffic.after)
        self.traffic.projected = self.traffic.after = None
        return ran


class _SteeredAttention(nn.Module):
    """An attention module with its memory."""

    def __init__(self, attention: nn.Module, traffic: _Traffic):
        super().__init__()
        self.attention, self.traffic = attention, traffic

    def forward(self, hidden_states: Tensor, *args: Any, traffic: tuple | None, **options: Any) -> Any:
        now = self.traffic
        if traffic is not None:
            memory, state, valid, write = traffic
            projected = memory.project(hidden_states)
            reads, after, _ = memory(projected, state, valid, None, write)
            now.memory, now.reads = memory, memory.scaled(reads, hidden_states.dtype)
            if write:
                now.projected, now.after = projected, after
        out = self.attention(hidden_states, *args, **options)
        now.memory = now.reads = None
        return out


class _Steered(nn.Module):
    """A projection whose output, or parts of it (head, start, stop), are steered."""

    def __init__(self, module: nn.Module, parts: list[tuple[str, int, int]], traffic: _Traffic):
        super().__init__()
        self.module, self.parts, self.traffic = module, parts, traffic

    def forward(self, x: Tensor) -> Tensor:
        out, memory, reads = self.module(x), self.traffic.memory, self.traffic.reads
        if memory is None or reads is None:
            return out
        pieces = [
            memory.steered(head, out[..., start:stop], reads) if head in memory.steer else out[..., start:stop]
            for head, start, stop in self.parts
        ]
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]


def _run(block: _Block, hidden_states: Tensor, traffic: tuple | None, options: dict[str, Any]) -> _Ran:
    return block(hidden_states, traffic, options)
