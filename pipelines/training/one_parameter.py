"""All parameters of an objective as one.

DeepSpeed looks at every parameter by itself: copies its gradient, takes its norm, asks whether it is finite. An adapter
has some hundred, all of them small, and on an H200 what a step issued for them took the host twice as long as the
GPU needed for all of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class OneParameter(nn.Module):
    """An objective with a single parameter, of which the objective's own are pieces.

    Args:
        objective: returns a named tuple with a ``loss``; its parameters are of one dtype and on one device.
    """

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.objective = (objective,)  # a tuple hides its parameters, which would be there twice
        named = dict(objective.named_parameters())
        self._own = list(named.values())
        self._shapes = {name: parameter.shape for name, parameter in named.items()}
        self.whole = nn.Parameter(self.join({name: parameter.detach() for name, parameter in named.items()}))
        self._kept: Tensor | None = None
        self.point()

    def forward(self, *args: Any) -> Any:
        """What the objective returns, whose loss has its gradient, and those that were kept, in the whole."""
        (objective,) = self.objective
        result = objective(*args)
        if not torch.is_grad_enabled():
            return result
        kept, self._kept = self._kept, None
        return result._replace(loss=_Gathered.apply(self.whole, [result.loss], self._own, kept))

    def keep(self, share: float, *args: Any) -> Any:
        """What the objective returns; such a share of its loss's gradient is kept for the next loss's, in float32."""
        (objective,) = self.objective
        result = objective(*args)
        gradient = _joined_gradients(result.loss * share, self._own).float()
        self._kept = gradient if self._kept is None else self._kept.add_(gradient)
        return result

    def point(self) -> None:
        """Lets the objective's parameters be views of the whole, after it was moved."""
        for parameter, piece in zip(self._own, self.pieces(self.whole.detach()).values(), strict=True):
            parameter.data = piece

    def pieces(self, whole: Tensor) -> dict[str, Tensor]:
        """Views of a tensor as long as the whole, by the names of the objective's parameters and of their shapes."""
        parts = whole.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def join(self, pieces: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`pieces`, as a new tensor."""
        return torch.cat([pieces[name].reshape(-1) for name in self._shapes])


class _Gathered(torch.autograd.Function):
    """A loss whose gradients of some parameters are the pieces of its gradient of the whole.

    The loss comes in a list, in which autograd doesn't see it: its backward pass is run here, for the parameters.
    """

    @staticmethod
    def forward(
        ctx, whole: Tensor, loss: Sequence[Tensor], parameters: Sequence[nn.Parameter], kept: Tensor | None
    ) -> Tensor:
        (ctx.loss,), ctx.parameters, ctx.kept = loss, parameters, kept
        return ctx.loss.detach().clone()

    @staticmethod
    def backward(ctx, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _joined_gradients(ctx.loss, ctx.parameters, d_loss)
        if ctx.kept is not None:
            gradient = (gradient + ctx.kept).to(gradient.dtype)
        return gradient, None, None, None


def _joined_gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], d_loss: Sequence[Tensor] | None = None
) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, d_loss, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
