"""The chunked Triton scan as PyTorch operators: the launch rule, the buffers, forward, backward, torch.compile.

One operator serves both entry points. Its input is packed [B, T, 4, N, r] in the order q | k | v | β: either the
projection as it comes (then ``beta_bias`` is given and the kernels normalise and gate as they load), or the
finished q, k, v, β stacked (then it is None).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import overload

import torch
import triton
from torch import Tensor

from deltamem_kernels.triton_backward import adjoint_offsets_kernel, gradients_kernel
from deltamem_kernels.triton_forward import reads_kernel, transitions_kernel
from deltamem_kernels.triton_tiles import WARP, compose_kernel, starts_kernel

LANES = WARP.value


@dataclass(frozen=True)
class Shape:
    """What a lane keeps in its registers, per rank."""

    matrix_rows: int  # rows of a chunk's matrix
    block: int  # tokens whose keys are spread at once
    gradient_block: int  # the same where states and gradients are kept as well
    composed_rows: int  # rows of a matrix that a program of the composition multiplies
    ahead: int  # chunks that a walk reads while it works on as many; four steps take about one read of L2


# Numbers that fill the 255 registers of a lane without spilling (tests/kernels/test_triton_compile.py).
SHAPES = {
    4: Shape(matrix_rows=4, block=16, gradient_block=8, composed_rows=4, ahead=4),
    8: Shape(matrix_rows=4, block=8, gradient_block=4, composed_rows=8, ahead=4),
    16: Shape(matrix_rows=4, block=4, gradient_block=2, composed_rows=4, ahead=4),
    32: Shape(matrix_rows=2, block=2, gradient_block=1, composed_rows=4, ahead=1),
}


@dataclass(frozen=True)
class Plan:
    """How T tokens are cut into chunks of ``length`` and groups of ``group`` chunks."""

    rank: int
    length: int
    group: int
    groups: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.rank]

    @property
    def chunks(self) -> int:
        return self.group * self.groups

    @property
    def programs(self) -> int:
        """Warps per (batch row, state)."""
        return self.chunks * self.rank // LANES

    @property
    def walked_rows(self) -> int:
        """State rows of one program that walks over chunks: as many as fill a warp."""
        return min(self.rank, LANES // self.rank)

    @cached_property
    def workspace(self) -> list[int]:
        """Floats per (batch row, state): the chunks' matrices and offsets, the groups' the same, and the starts."""
        square, cube = self.rank**2, self.rank**3
        wide = self.groups if self.groups > 1 else 0
        return [self.chunks * cube, self.chunks * square, wide * cube, wide * square, self.chunks * square]


@lru_cache(maxsize=4096)
def plan_for(tokens: int, rank: int) -> Plan:
    """Chunks of about √T / 3 tokens (a power of two from 16 to 256), groups of about the root of their number.

    The longest path is two passes over a chunk, one over a group and one over the groups; the matrices cost
    4 r³ / length bytes per token. Powers of two keep the number of compiled variants at five per rank.
    """
    length = min(256, max(16, triton.next_power_of_2(math.ceil(math.sqrt(tokens) / 3))))
    side_by_side = LANES // rank
    chunks = triton.cdiv(triton.cdiv(tokens, length), side_by_side) * side_by_side
    group = chunks if chunks <= 32 else max(side_by_side, triton.next_power_of_2(math.ceil(math.sqrt(chunks))))
    return Plan(rank, length, group, triton.cdiv(chunks, group))


_COMPILED: dict = {}


def _launch(kernel, grid: tuple[int, int, int], args: tuple, constants: tuple) -> None:
    """One warp per program. Repeats skip Triton's look-up and its question to the driver about every pointer.

    Those cost more than a short scan takes. Skipping them is sound because nothing varies beyond the key: sizes
    are not specialised on, :func:`_ready` aligns every pointer, and all of them are on one device.
    """
    key = (kernel, args[0].device, *(x.dtype for x in args if isinstance(x, Tensor)), constants)
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*args, *constants, num_warps=1, num_stages=1)
    else:
        compiled[grid](*(x.data_ptr() if isinstance(x, Tensor) else x for x in args), *constants)


@overload
def _ready(x: Tensor) -> Tensor: ...
@overload
def _ready(x: None) -> None: ...
def _ready(x: Tensor | None) -> Tensor | None:
    """Contiguous and 16-byte aligned."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _on_device(x: Tensor):
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _walk(plan: Plan, programs: int, buffers: Sequence[Tensor], given: Tensor, final: Tensor, adjoint: bool) -> None:
    """From the chunks' matrices and offsets to the state before every chunk (or the gradient after it)."""
    matrices, offsets, wide_matrices, wide_offsets, starts = buffers
    rank, rows = plan.rank, plan.walked_rows
    if plan.groups > 1:
        composed_rows = rank if adjoint else plan.shape.composed_rows
        _launch(
            compose_kernel,
            (plan.groups, programs, rank // rows * (rank // composed_rows)),
            (matrices, offsets, wide_matrices, wide_offsets, plan.group),
            (rank, rows, composed_rows, plan.shape.ahead, adjoint),
        )
    _launch(
        starts_kernel,
        (plan.groups, programs, rank // rows),
        (matrices, offsets, wide_matrices, wide_offsets, given, starts, final, plan.group),
        (rank, rows, plan.shape.ahead, adjoint),
    )


def _outputs(packed: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _, states, rank = packed.shape
    if isinstance(tokens, int):
        workspace = batch * states * sum(plan_for(tokens, rank).workspace)
    else:  # a compiler's symbol for any length, which a plan would make the one it has just seen
        workspace = torch.library.get_ctx().new_dynamic_size()
    return state.new_empty(batch, tokens, states, rank), torch.empty_like(state), state.new_empty(workspace)


def _scan(packed: Tensor, beta_bias: Tensor | None, state: Tensor, mask: Tensor | None):
    packed, beta_bias, state, mask = _ready(packed), _ready(beta_bias), _ready(state), _ready(mask)
    batch, tokens, _, states, rank = packed.shape
    plan, shape, programs = plan_for(tokens, rank), SHAPES[rank], batch * states
    gated, masked = beta_bias is not None, mask is not None
    reads, new_state, workspace = _outputs(packed, state)
    buffers = workspace.split([programs * size for size in plan.workspace])
    with _on_device(packed):
        _launch(
            transitions_kernel,
            (plan.programs, programs, rank // shape.matrix_rows),
            (packed, beta_bias, mask, buffers[0], buffers[1], tokens, states),
            (rank, plan.length, shape.block, shape.matrix_rows, gated, masked),
        )
        _walk(plan, programs, buffers, state, new_state, False)
        _launch(
            reads_kernel,
            (plan.programs, programs, 1),
            (packed, beta_bias, mask, buffers[4], reads, tokens, states),
            (rank, plan.length, shape.block, gated, masked),
        )
    return reads, new_state, workspace


def _scan_backward(
    d_reads: Tensor, d_new_state: Tensor, packed: Tensor, beta_bias: Tensor | None, mask: Tensor | None,
    workspace: Tensor,
):  # fmt: skip
    packed, beta_bias, mask = _ready(packed), _ready(beta_bias), _ready(mask)
    d_reads, d_new_state = _ready(d_reads), _ready(d_new_state)
    batch, tokens, _, states, rank = packed.shape
    plan, shape, programs = plan_for(tokens, rank), SHAPES[rank], batch * states
    gated, masked = beta_bias is not None, mask is not None
    d_packed, d_state = torch.empty_like(packed), torch.empty_like(d_new_state)
    d_bias = workspace.new_empty(batch * plan.programs if gated else 0, states * rank)
    matrices, _, wide_matrices, _, starts = workspace.split([programs * size for size in plan.workspace])
    square = programs * rank**2
    wide = plan.groups if plan.groups > 1 else 0
    blocks = plan.length // shape.gradient_block
    sizes = [plan.chunks * square, wide * square, plan.chunks * square, blocks * plan.chunks * square]
    offsets, wide_offsets, ends, past = workspace.new_empty(sum(sizes)).split(sizes)
    with _on_device(packed):
        _launch(
            adjoint_offsets_kernel,
            (plan.programs, programs, 1),
            (packed, beta_bias, mask, d_reads, offsets, tokens, states),
            (rank, plan.length, shape.block, gated, masked),
        )
        _walk(plan, programs, (matrices, offsets, wide_matrices, wide_offsets, ends), d_new_state, d_state, True)
        _launch(
            gradients_kernel,
            (plan.programs, programs, 1),
            (packed, beta_bias, mask, d_reads, starts, ends, past, d_packed, d_bias, tokens, states),
            (rank, plan.length, shape.gradient_block, gated, masked),
        )
    return d_packed, d_bias.sum(0), d_state


_LIBRARY = torch.library.Library("deltamem", "FRAGMENT")
_LIBRARY.define("scan(Tensor packed, Tensor? beta_bias, Tensor state, Tensor? mask) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "scan_backward(Tensor d_reads, Tensor d_new_state, Tensor packed, Tensor? beta_bias, Tensor? mask,"
    " Tensor workspace) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("scan", _scan, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_backward", _scan_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("deltamem::scan", lib=_LIBRARY)
def _(packed, beta_bias, state, mask):
    return _outputs(packed, state)


@torch.library.register_fake("deltamem::scan_backward", lib=_LIBRARY)
def _(d_reads, d_new_state, packed, beta_bias, mask, workspace):
    states, rank = packed.shape[-2:]
    return torch.empty_like(packed), workspace.new_empty(states * rank), torch.empty_like(d_new_state)


def _save(ctx, inputs, output) -> None:
    packed, beta_bias, state, mask = inputs
    ctx.save_for_backward(packed, beta_bias, mask, output[2])
    ctx.state_shape = state.shape
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_reads, d_new_state, _):
    packed, beta_bias, mask, workspace = ctx.saved_tensors
    if d_reads is None:
        d_reads = workspace.new_zeros(packed.shape[:2] + packed.shape[3:])
    if d_new_state is None:
        d_new_state = workspace.new_zeros(ctx.state_shape)
    d_packed, d_bias, d_state = torch.ops.deltamem.scan_backward.default(
        d_reads, d_new_state, packed, beta_bias, mask, workspace
    )
    return d_packed, None if beta_bias is None else d_bias.to(beta_bias.dtype), d_state, None


torch.library.register_autograd("deltamem::scan", _differentiate, setup_context=_save, lib=_LIBRARY)


def _run(packed: Tensor, beta_bias: Tensor | None, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens, _, states, rank = packed.shape
    if rank not in SHAPES:
        raise ValueError(f"the triton scan supports ranks {sorted(SHAPES)}, got {rank}; use backend='torch'")
    if state.dtype != torch.float32 or state.shape != (batch, states, rank, rank):
        raise ValueError(
            f"the state must be float32 {(batch, states, rank, rank)}, got {state.dtype} {tuple(state.shape)}"
        )
    if packed.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the triton scan takes float32, bfloat16 or float16 inputs, got {packed.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, tokens)):
        raise ValueError(f"mask must be bool {(batch, tokens)}, got {mask.dtype} {tuple(mask.shape)}")
    if tokens == 0:
        return state.new_empty(batch, 0, states, rank), state
    reads, new_state, _ = torch.ops.deltamem.scan.default(packed, beta_bias, state, mask)
    return reads, new_state


def triton_delta_scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same function as :func:`deltamem_kernels.naive.naive_delta_scan`, r in {4, 8, 16, 32}, state float32.

    Raises:
        ValueError: a rank, dtype or shape that the kernels don't take.
    """
    return _run(torch.stack((q, k, v, beta), dim=2), None, state, mask)


def triton_gated_delta_scan(
    projected: Tensor, beta_bias: Tensor, state: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """gate_projections and the scan in the same kernels. projected [B, T, 4·N·r], beta_bias [N·r].

    Raises:
        ValueError: a rank, dtype or shape that the kernels don't take.
    """
    return _run(projected.unflatten(-1, (4, state.shape[1], state.shape[-1])), beta_bias, state, mask)
