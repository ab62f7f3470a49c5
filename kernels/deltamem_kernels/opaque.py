"""The scan in plain PyTorch as one operator, for compilers: they would write its chunks out, anew for every length."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_kernels.chunk import chunk_delta_scan
from deltamem_kernels.gates import gate_projections


def _scan(projected: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = gate_projections(projected, beta_bias, state.shape[1], state.shape[-1])
    reads, state = chunk_delta_scan(*inputs, state, mask)
    return reads.contiguous(), state.contiguous()


def _scan_backward(
    d_reads: Tensor, d_new_state: Tensor, projected: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (projected, beta_bias, state)]
        outputs = _scan(*inputs, mask)
    d_projected, d_bias, d_state = torch.autograd.grad(outputs, inputs, (d_reads, d_new_state))
    return d_projected.contiguous(), d_bias.contiguous(), d_state.contiguous()


def _fake_scan(projected, beta_bias, state, mask):
    _, states, rank, _ = state.shape
    return state.new_empty(*projected.shape[:2], states, rank), state.new_empty(state.shape)


def _fake_scan_backward(d_reads, d_new_state, projected, beta_bias, state, mask):
    return tuple(x.new_empty(x.shape) for x in (projected, beta_bias, state))


_LIBRARY = torch.library.Library("deltamem", "FRAGMENT")
_LIBRARY.define("torch_scan(Tensor projected, Tensor beta_bias, Tensor state, Tensor? mask) -> (Tensor, Tensor)")
_LIBRARY.define(
    "torch_scan_backward(Tensor d_reads, Tensor d_new_state, Tensor projected, Tensor beta_bias, Tensor state,"
    " Tensor? mask) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("torch_scan", _scan, "CompositeExplicitAutograd")
_LIBRARY.impl("torch_scan_backward", _scan_backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem::torch_scan", _fake_scan, lib=_LIBRARY)
torch.library.register_fake("deltamem::torch_scan_backward", _fake_scan_backward, lib=_LIBRARY)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_reads, d_new_state):
    return *torch.ops.deltamem.torch_scan_backward.default(d_reads, d_new_state, *ctx.saved_tensors), None


torch.library.register_autograd("deltamem::torch_scan", _differentiate, setup_context=_save, lib=_LIBRARY)

opaque_gated_delta_scan = torch.ops.deltamem.torch_scan.default
"""As :func:`deltamem_kernels.gated_delta_scan`, by chunks."""
