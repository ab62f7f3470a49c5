"""Steps of small backbones as CUDA graphs.

Such a step is some ten thousand kernels of a few microseconds, and issuing them takes ten times as long as running
them. A graph issues all of a micro-batch's writing, reading and backward pass at once. It is of fixed sizes, so batches
are padded to a few shapes (:mod:`pipelines.training.padding`), one graph each. What follows, reduction, clipping and
update, stays DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import masking_utils

from pipelines.errors import StageError
from pipelines.training.batches import EpisodeBatch, Reads, Texts
from pipelines.training.objective import EpisodeLoss, MemoryObjective
from pipelines.training.padding import Shape, padded, plan

Pass = Callable[[], EpisodeLoss]


class GraphCapture:
    """Makes graphs of passes. They share their memory, so what one leaves holds until another runs."""

    def __init__(self) -> None:
        self._pool: torch.cuda.MemPool | None = None
        self._warm_ups = 2
        """Passes before the next capture: they compile kernels and make handles, which can't be done inside one."""

    def __call__(self, function: Pass) -> Pass:
        """What does the same as ``function``, with the values that its tensors have then, and at the same places.

        Raises:
            StageError: it does something that no graph can hold.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self._warm_ups):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self._warm_ups = 1  # what a shape still asks for is compiled kernels
        torch.cuda.empty_cache()  # of these passes, which were outside of the pool
        graph = torch.cuda.CUDAGraph()
        # held here: a pool that only graphs hold goes with the last of them, and none can be made in it any more
        self._pool = self._pool or torch.cuda.MemPool()
        pool: Any = self._pool.id
        try:
            # "thread_local": other threads of the process (NCCL's, the loader's) may go on meanwhile
            with _masks_as_ever(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise StageError(
                f"train.cuda_graphs: this backbone's pass can't be captured ({error}); set train.cuda_graphs: false"
            ) from error

        def replay() -> EpisodeLoss:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True)
class _Captured:
    """A pass over a batch of its own, in a shape."""

    shape: Shape
    batch: EpisodeBatch
    run: Pass


class StepGraphs:
    """Losses of batches, each with its gradients, by passes that are captured as shapes come up.

    A batch takes the smallest shape that was prepared and holds it. Where there is none it takes the one of its kind,
    which is captured anew, larger, when it turns out too small.

    Args:
        objective: what computes the losses; its parameters are trained in tensors that are updated in place.
        capture: what makes a pass one that can be run again.
    """

    def __init__(self, objective: MemoryObjective, capture: Callable[[Pass], Pass] | None = None):
        self._losses, self._parameters = _Losses(objective), list(objective.parameters())
        self._capture = capture or GraphCapture()
        self._plan: list[Shape] = []
        self._captured: dict[Shape | tuple, _Captured] = {}
        self._gradients: list[Tensor] = []

    @property
    def count(self) -> int:
        """Shapes so far."""
        return len(self._captured)

    def prepare(self, sample: Sequence[EpisodeBatch], count: int) -> None:
        """Plans shapes for the batches to come, and captures them.

        The largest comes first: the others then find its memory free, and all need little more than it does.

        Args:
            sample: some of the batches, on a GPU.
            count: of all of them.

        Raises:
            StageError: this backbone's pass can't be captured.
        """
        shapes = [Shape.of(batch) for batch in sample]
        self._plan = plan(shapes, count)
        examples = {
            planned: batch for batch, own in zip(sample, shapes, strict=True) if (planned := self._planned(own))
        }
        self._plan = [shape for shape in self._plan if shape in examples]  # smaller ones may hold all of another's
        for shape in reversed(self._plan):
            self._captured[shape] = self._of_shape(shape, self._losses.objective.begun(examples[shape]))

    def __call__(self, batch: EpisodeBatch) -> EpisodeLoss:
        """The losses of a batch on a GPU; they hold until the next call, and ``loss`` can be differentiated once.

        Raises:
            StageError: this backbone's pass can't be captured.
        """
        captured = self._for(batch)
        for ours, theirs in zip(_tensors(captured.batch), _tensors(padded(batch, captured.shape)), strict=True):
            ours.copy_(theirs)
        result = captured.run()
        loss = _HandOn.apply(result.loss, self._gradients, *self._parameters)
        return result._replace(loss=loss, token_nll=result.token_nll[: len(batch.answer_ids)])

    def _for(self, batch: EpisodeBatch) -> _Captured:
        own = Shape.of(batch)
        if planned := self._planned(own):
            return self._captured[planned]
        shape = own.rounded()
        found = self._captured.get(shape.kind)
        if found is not None:
            shape = found.shape.joined(shape)
        if found is None or shape != found.shape:
            del found  # its memory goes back to the pool first
            self._captured.pop(shape.kind, None)
            self._captured[shape.kind] = self._of_shape(shape, batch)
        return self._captured[shape.kind]

    def _planned(self, own: Shape) -> Shape | None:
        """The smallest shape of the plan that holds a batch of that one."""
        return next((shape for shape in self._plan if shape.holds(own)), None)

    def _of_shape(self, shape: Shape, batch: EpisodeBatch) -> _Captured:
        if not self._gradients:
            self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        own = padded(batch, shape)
        if own.contrast is not None:  # which is not padded, so it is the batch's
            own = replace(own, contrast=own.contrast.clone())
        return _Captured(shape, own, self._capture(lambda: self._pass(own)))

    def _pass(self, batch: EpisodeBatch) -> EpisodeLoss:
        """Forward and backward; the gradients are left where every pass leaves them.

        Not of the parameters themselves: their autograd nodes, which a loss or an optimiser's hooks keep alive, belong
        to the stream that first used them, and a capture may not touch another stream.
        """
        with torch.enable_grad():
            aliases = {name: p.detach().requires_grad_() for name, p in self._losses.named_parameters()}
            result = functional_call(self._losses, aliases, (batch,))
            gradients = torch.autograd.grad(
                result.loss, list(aliases.values()), allow_unused=True, materialize_grads=True
            )
        torch._foreach_copy_(self._gradients, gradients)
        return result._replace(loss=result.loss.detach())


class _Losses(nn.Module):
    """An objective's losses as a module's forward pass, whose parameters can be replaced for a call."""

    def __init__(self, objective: MemoryObjective):
        super().__init__()
        self.objective = objective

    def forward(self, batch: EpisodeBatch) -> EpisodeLoss:
        return self.objective.losses(batch)


class _HandOn(torch.autograd.Function):
    """A loss whose gradients are known: its backward pass only hands them on."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(list(ctx.gradients), d_loss[0])


@contextmanager
def _masks_as_ever() -> Generator[None]:
    """transformers takes a capture for a trace, and would write out the causal mask that kernels have inside."""
    name = "is_tracing"
    before = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda *args: False)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


def _tensors(batch: Texts | Reads) -> list[Tensor]:
    """The tensors of a batch that are on the GPU, in an order that batches of a shape have in common."""
    found: list[Tensor] = []
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name != "segment_ids":
            found.append(value)
        for part in value if name == "after" else (value,):
            if isinstance(part, Texts | Reads):
                found += _tensors(part)
    return found
