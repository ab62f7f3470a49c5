"""What the scan's kernels share: where their lanes and tiles lie, loading with gates, and the steps over chunks.

Every program is one warp, and a lane is one (chunk, state row): 32 / r neighbouring chunks, r rows each. A lane
keeps its row, and the key or query of the current token, in registers, so that a token's dot products need no
other lane. Triton hands out lanes from the last axis backwards and the tensors here have the lanes last, which
is what keeps every axis before it inside the thread. ``kernels/README.md`` has the derivation.

Letters: i is a row of the state, j a key column, a a row of a chunk's matrix, c a chunk, u a place in a block.
"""

import triton
import triton.language as tl

WARP = tl.constexpr(32)

# Blocks of the packed input, in this order (as in gate_projections).
QUERY = tl.constexpr(0)
KEY = tl.constexpr(1)
VALUE = tl.constexpr(2)
BETA = tl.constexpr(3)

# The square of F.normalize's floor for the norm.
TINY_SQUARE = tl.constexpr(1e-24)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: the odd series near zero, where the exponential form cancels."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    fall = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - fall) / (1.0 + fall)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def inverse_norm(x):
    """1 / norm along the last axis, as F.normalize clamps it: [x, 1]."""
    return tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), TINY_SQUARE))[:, None]


@triton.jit
def lane_ids(R: tl.constexpr, size):
    """(state row, chunk) of the 32 lanes.

    The row has a zero added (any size is positive) that hides from Triton that rows are aligned. Knowing them
    contiguous it puts neighbours on neighbouring lanes; not knowing them aligned it makes no 16-byte vectors,
    which would spread the summed axis over several lanes and cost a shuffle per token and key.
    """
    return tl.arange(0, WARP) % R + tl.minimum(size, 0), tl.arange(0, WARP) // R


@triton.jit
def origin(T, N, R: tl.constexpr, LENGTH: tl.constexpr):
    """Where a program of the grid (chunks · r / 32, B·N) begins: (token of B·T, channel of N·r, tokens to the end)."""
    bn = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (WARP // R * LENGTH)
    return (bn // N) * T + first, (bn % N) * R, T - first


@triton.jit
def program_number():
    """Programs counted over all rows and states; a program's chunks follow those of the one before."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def load_lanes(base, place, i, chunk, LENGTH: tl.constexpr, BLOCK: tl.constexpr, stride, left):
    """A block of the lanes' own channels, [u, lane] in float32."""
    token = place + tl.arange(0, BLOCK)[:, None] + (chunk * LENGTH)[None, :]
    return tl.load(base + token * stride + i[None, :], mask=token < left, other=0.0).to(tl.float32)


@triton.jit
def load_rows(base, place, R: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, stride, left):
    """A block of whole q or k channels, [u·c, j] as they are stored."""
    x = tl.arange(0, BLOCK * (WARP // R))
    token = place + x // (WARP // R) + (x % (WARP // R)) * LENGTH
    at = token[:, None] * stride + tl.arange(0, R)[None, :]
    return tl.load(base + at, mask=(token < left)[:, None], other=0.0)


@triton.jit
def load_counts(mask, place, R: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, left,
                MASKED: tl.constexpr):  # fmt: skip
    """Which tokens of a block count, [u·c]."""
    x = tl.arange(0, BLOCK * (WARP // R))
    token = place + x // (WARP // R) + (x % (WARP // R)) * LENGTH
    counts = token < left
    if MASKED:
        counts = counts & (tl.load(mask + token, mask=counts, other=0) != 0)
    return counts


@triton.jit
def counts_to_lanes(counts, R: tl.constexpr, BLOCK: tl.constexpr):
    """[u·c] → [u, lane]."""
    counts = tl.reshape(counts, (BLOCK, WARP // R))
    return tl.reshape(tl.broadcast_to(counts[:, :, None], (BLOCK, WARP // R, R)), (BLOCK, WARP))


@triton.jit
def store_lanes(base, values, place, i, chunk, LENGTH: tl.constexpr, BLOCK: tl.constexpr, stride, left):
    """The other way of load_lanes."""
    token = place + tl.arange(0, BLOCK)[:, None] + (chunk * LENGTH)[None, :]
    tl.store(base + token * stride + i[None, :], values, mask=token < left)


@triton.jit
def store_rows(base, values, place, R: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, stride, left):
    """The other way of load_rows."""
    x = tl.arange(0, BLOCK * (WARP // R))
    token = place + x // (WARP // R) + (x % (WARP // R)) * LENGTH
    tl.store(base + token[:, None] * stride + tl.arange(0, R)[None, :], values, mask=(token < left)[:, None])


@triton.jit
def load_shift(bias, channel, i, GATED: tl.constexpr):
    """The lanes' own β bias, [1, lane]."""
    if GATED:
        shift = tl.load(bias + channel + i)[None, :].to(tl.float32)
    else:
        shift = tl.zeros((1, WARP), tl.float32)
    return shift


@triton.jit
def gate_betas(betas, shift, seen, GATED: tl.constexpr):
    """β as the recurrence takes it, zero where the token does not count."""
    if GATED:
        betas = sigmoid(betas + shift)
    return tl.where(seen, betas, 0.0)


@triton.jit
def gate_rows(raw, counts, GATED: tl.constexpr):
    """q or k as the recurrence takes them, zero where the token does not count."""
    x = raw.to(tl.float32)
    if GATED:
        x = tanh(x)
        x = x * inverse_norm(x)
    return tl.where(counts[:, None], x, 0.0)


@triton.jit
def ungate_rows(raw, counts, grad, GATED: tl.constexpr):
    """The gradient of gate_rows with respect to raw."""
    if GATED:
        bent = tanh(raw.to(tl.float32))
        shrink = inverse_norm(bent)
        unit = bent * shrink
        grad = (grad - unit * tl.sum(unit * grad, axis=1)[:, None]) * shrink * (1.0 - bent * bent)
    return tl.where(counts[:, None], grad, 0.0)


@triton.jit
def to_lanes(x, R: tl.constexpr, BLOCK: tl.constexpr):
    """[u·c, j] → [u, j, lane]: every lane gets the whole key of its chunk, through shared memory once a block."""
    x = tl.permute(tl.reshape(x, (BLOCK, WARP // R, R)), (0, 2, 1))
    return tl.reshape(tl.broadcast_to(x[:, :, :, None], (BLOCK, R, WARP // R, R)), (BLOCK, R, WARP))


@triton.jit
def from_lanes(x, R: tl.constexpr, BLOCK: tl.constexpr):
    """[u, j, c] → [u·c, j], the way back of to_lanes."""
    return tl.reshape(tl.permute(x, (0, 2, 1)), (BLOCK * (WARP // R), R))


@triton.jit
def at_place(block, u: tl.constexpr):
    """block[u]. With u constant and the axis inside the thread, adding integer zeros folds to the register itself."""
    bits = block.to(tl.int32, bitcast=True)
    here = tl.arange(0, block.shape[0]) == u
    if len(block.shape) == 3:
        kept = tl.where(here[:, None, None], bits, 0)
    else:
        kept = tl.where(here[:, None], bits, 0)
    return tl.sum(kept, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def put_place(block, u: tl.constexpr, x):
    """block with block[u] = x; folds to a register as well."""
    here = tl.arange(0, block.shape[0]) == u
    if len(block.shape) == 3:
        block = tl.where(here[:, None, None], x[None, :, :], block)
    else:
        block = tl.where(here[:, None], x[None, :], block)
    return block


@triton.jit
def write(s, key, value, beta):
    """One token's write on the rows s [j, lane]."""
    correction = beta * (value - tl.sum(s * key, axis=0))
    return s * (1.0 - beta)[None, :] + correction[None, :] * key


@triton.jit
def cell_ids(R: tl.constexpr, ROWS: tl.constexpr, size):
    """(key column, state row) of the lanes (j, i) that walk over chunks; the row hides its alignment as above."""
    z = tl.arange(0, R * ROWS)
    return z // ROWS, z % ROWS + tl.program_id(2) % (R // ROWS) * ROWS + tl.minimum(size, 0)


@triton.jit
def fetch(matrices, offsets, first, move, step, count, j, i, R: tl.constexpr, AHEAD: tl.constexpr,
          ADJOINT: tl.constexpr):  # fmt: skip
    """The AHEAD chunks from ``step`` on of a walk of ``count``: (matrices [w, m, (j, i)], offsets [w, (j, i)]).

    Transposed for the adjoint. Past the walk's end the identity, so that every block of steps is whole.
    """
    w = step + tl.arange(0, AHEAD)
    m = tl.arange(0, R)[None, :, None]
    chunk = (first + move * w).to(tl.int64)
    if ADJOINT:
        at = m * R + (j * (R * R) + i)[None, None, :]
    else:
        at = m * (R * R) + (j * R + i)[None, None, :]
    at = (chunk * (R * R * R))[:, None, None] + at
    identity = tl.where(m == j[None, None, :], 1.0, 0.0)
    matrix = tl.load(matrices + at, mask=(w < count)[:, None, None], other=identity)
    at = (chunk * (R * R))[:, None] + (j * R + i)[None, :]
    return matrix, tl.load(offsets + at, mask=(w < count)[:, None], other=0.0)


@triton.jit
def carry(state, matrix, offset, R: tl.constexpr, ROWS: tl.constexpr):
    """Rows [(j, i)] over one chunk: state · matrix + offset."""
    rows = tl.broadcast_to(tl.reshape(state, (R, ROWS))[:, None, :], (R, R, ROWS))
    return tl.sum(tl.reshape(rows, (R, R * ROWS)) * matrix, axis=0) + offset


@triton.jit(do_not_specialize=["GROUP"])
def compose_kernel(matrices, offsets, wide_matrices, wide_offsets, GROUP, R: tl.constexpr, ROWS: tl.constexpr,
                   MATRIX_ROWS: tl.constexpr, AHEAD: tl.constexpr, ADJOINT: tl.constexpr):  # fmt: skip
    """The matrix and offset of GROUP chunks in a row (in reverse order, and the offset alone, for the adjoint).

    Grid (groups, B·N, r / ROWS · r / MATRIX_ROWS).
    """
    group = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    j, i = cell_ids(R, ROWS, GROUP)
    a = tl.program_id(2) // (R // ROWS) * MATRIX_ROWS + tl.arange(0, MATRIX_ROWS)
    total = tl.zeros((R * ROWS,), tl.float32)
    product = tl.where(a[:, None] == j[None, :], 1.0, 0.0)
    first = group * GROUP
    move = 1
    if ADJOINT:
        first += GROUP - 1
        move = -1
    matrix, offset = fetch(matrices, offsets, first, move, 0, GROUP, j, i, R, AHEAD, ADJOINT)
    for step in range(0, GROUP, AHEAD):
        next_matrix, next_offset = fetch(matrices, offsets, first, move, step + AHEAD, GROUP, j, i, R, AHEAD, ADJOINT)
        for u in tl.static_range(AHEAD):
            factor = at_place(matrix, u)
            total = carry(total, factor, at_place(offset, u), R, ROWS)
            if not ADJOINT:
                rows = tl.permute(tl.reshape(product, (MATRIX_ROWS, R, ROWS)), (1, 0, 2))[:, :, None, :]
                rows = tl.reshape(tl.broadcast_to(rows, (R, MATRIX_ROWS, R, ROWS)), (R, MATRIX_ROWS, R * ROWS))
                product = tl.sum(rows * factor[:, None, :], axis=0)
        matrix, offset = next_matrix, next_offset
    tl.store(wide_offsets + group.to(tl.int64) * (R * R) + j * R + i, total)
    if not ADJOINT:
        at = a[:, None] * (R * R) + (j * R + i)[None, :]
        tl.store(wide_matrices + group.to(tl.int64) * (R * R * R) + at, product)


@triton.jit(do_not_specialize=["GROUP"])
def starts_kernel(matrices, offsets, wide_matrices, wide_offsets, given, starts, final, GROUP, R: tl.constexpr,
                  ROWS: tl.constexpr, AHEAD: tl.constexpr, ADJOINT: tl.constexpr):  # fmt: skip
    """The state before every chunk and after the last; for the adjoint, its gradient from the far end.

    Grid (groups, B·N, r / ROWS). Each program walks over the groups before its own, then over its own chunks.
    """
    order = tl.program_id(0)
    groups = tl.num_programs(0)
    bn = tl.program_id(1)
    j, i = cell_ids(R, ROWS, GROUP)
    wide = bn * groups
    first = (bn * groups + order) * GROUP
    move = 1
    if ADJOINT:
        wide += groups - 1
        first = (bn * groups + groups - order) * GROUP - 1
        move = -1
    state = tl.load(given + bn.to(tl.int64) * (R * R) + i * R + j)

    next_matrix, next_offset = fetch(matrices, offsets, first, move, 0, GROUP, j, i, R, AHEAD, ADJOINT)
    matrix, offset = fetch(wide_matrices, wide_offsets, wide, move, 0, order, j, i, R, AHEAD, ADJOINT)
    for step in range(0, order, AHEAD):
        far_matrix, far_offset = fetch(
            wide_matrices, wide_offsets, wide, move, step + AHEAD, order, j, i, R, AHEAD, ADJOINT
        )
        for u in tl.static_range(AHEAD):
            state = carry(state, at_place(matrix, u), at_place(offset, u), R, ROWS)
        matrix, offset = far_matrix, far_offset
    matrix, offset = next_matrix, next_offset
    for step in range(0, GROUP, AHEAD):
        next_matrix, next_offset = fetch(matrices, offsets, first, move, step + AHEAD, GROUP, j, i, R, AHEAD, ADJOINT)
        for u in tl.static_range(AHEAD):
            here = (first + move * (step + u)).to(tl.int64)
            tl.store(starts + here * (R * R) + j * R + i, state, mask=(j >= 0) & (step + u < GROUP))
            state = carry(state, at_place(matrix, u), at_place(offset, u), R, ROWS)
        matrix, offset = next_matrix, next_offset
    if order == groups - 1:
        tl.store(final + bn.to(tl.int64) * (R * R) + i * R + j, state)
