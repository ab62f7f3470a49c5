"""How much a memory steers: the size of what it adds to a projection, beside the projection's own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltamem.backbone.decoder import Projection, find_decoder
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel

SAMPLE = (
    "The harbour of Lindholm was built in 1862 by the engineer Greta Sand, who had seen the storms of three winters. "
    "Its light can be seen for nineteen miles, and the keeper writes the name of every ship into a green book. "
    "In the spring the book is read aloud in the square."
)
"""Ordinary text to measure on, where nobody gives any."""


@torch.no_grad()
def steering_ratios(
    model: DeltaMemModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    memory: DeltaMemory | None = None,
    segment_ids: Tensor | None = None,
) -> dict[int, dict[str, float]]:
    """‖Δo‖ / ‖o‖, ‖Δq‖ / ‖q‖ and so on: {layer: {head: ratio}}, norms over all tokens that aren't padding.

    Δ is what is added to the output of a head's projection when the tokens are read (and written) after the ones that
    the memory holds; the output that it is compared with is the one it is added to.

    Args:
        input_ids: [B, T] int.
        attention_mask: [B, T]; 0 marks padding.
        memory: None: what the tokens themselves write, read in a second pass.
        segment_ids: [B, T] int, which ssw needs.
    """
    options: dict[str, Any] = {"attention_mask": attention_mask, "segment_ids": segment_ids}
    if memory is None:
        memory = model.write(input_ids, **options)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    squares: dict[int, dict[str, list[float]]] = {}
    with _watched(model, valid, squares):
        model(input_ids, memory=memory, logits_to_keep=1, **options)
    return {
        layer: {head: (added / max(own, 1e-30)) ** 0.5 for head, (own, added) in heads.items()}
        for layer, heads in squares.items()
    }


@contextmanager
def _watched(model: DeltaMemModel, valid: Tensor, squares: dict[int, dict[str, list[float]]]) -> Generator[None]:
    """Inside, each pass leaves the squared norms of what is steered and of what is added."""
    layers, handles = find_decoder(model.base_model).layers, []
    for name in model.memory_layers:
        squares[int(name)] = {}
        for head, projection in layers[int(name)].projections.items():
            if head in model.config.steer:
                watch = _Watch(projection, valid, partial(squares[int(name)].__setitem__, head))
                # the adapter's own hook, which steers in place, runs between these two
                handles.append(projection.module.register_forward_hook(watch.before, prepend=True))
                handles.append(projection.module.register_forward_hook(watch.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """One projection's output before and after it is steered."""

    def __init__(self, projection: Projection, valid: Tensor, keep):
        self.projection, self.valid, self.keep = projection, valid, keep

    def _part(self, output: Tensor) -> Tensor:
        part = output[..., self.projection.start : self.projection.stop]
        return part[self.valid.to(part.device)].float()

    def before(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.own = self._part(output).clone()

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        added = self._part(output) - self.own
        self.keep([float(self.own.square().sum()), float(added.square().sum())])
