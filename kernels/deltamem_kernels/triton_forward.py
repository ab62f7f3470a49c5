"""Triton kernels of the chunked scan, forward: what every chunk does to a state, then the reads of every chunk."""

import triton
import triton.language as tl

from deltamem_kernels.triton_tiles import (
    BETA,
    KEY,
    QUERY,
    VALUE,
    WARP,
    at_place,
    counts_to_lanes,
    gate_betas,
    gate_rows,
    lane_ids,
    load_counts,
    load_lanes,
    load_rows,
    load_shift,
    origin,
    program_number,
    to_lanes,
    write,
)


@triton.jit(do_not_specialize=["T", "N"])
def transitions_kernel(packed, bias, mask, matrices, offsets, T, N, R: tl.constexpr, LENGTH: tl.constexpr,
                       BLOCK: tl.constexpr, MATRIX_ROWS: tl.constexpr, GATED: tl.constexpr,
                       MASKED: tl.constexpr):  # fmt: skip
    """Per chunk and row i: the r×r matrix and the offset with s_end = s_start · matrix + offset.

    Grid (chunks · r / 32, B·N, r / MATRIX_ROWS): a lane carries MATRIX_ROWS rows of its matrix, and the offset.
    """
    token, channel, left = origin(T, N, R, LENGTH)
    stride = 4 * N * R
    base = packed + token * stride + channel
    if MASKED:
        mask += token
    i, chunk = lane_ids(R, T)
    j = tl.arange(0, R)
    a = tl.program_id(2) * MATRIX_ROWS + tl.arange(0, MATRIX_ROWS)
    shift = load_shift(bias, channel, i, GATED)

    matrix = tl.where(j[:, None, None] == a[None, :, None], 1.0, 0.0) + tl.zeros((1, 1, WARP), tl.float32)
    offset = tl.zeros((R, WARP), tl.float32)
    raw = load_rows(base + KEY * N * R, 0, R, LENGTH, BLOCK, stride, left)
    counts = load_counts(mask, 0, R, LENGTH, BLOCK, left, MASKED)
    for place in range(0, LENGTH, BLOCK):
        values = load_lanes(base + VALUE * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        betas = load_lanes(base + BETA * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        seen = counts_to_lanes(counts, R, BLOCK)
        keys = to_lanes(gate_rows(raw, counts, GATED), R, BLOCK)
        # The next block's rows travel while this one is worked on; past the chunk's end they are not used.
        raw = load_rows(base + KEY * N * R, place + BLOCK, R, LENGTH, BLOCK, stride, left)
        counts = load_counts(mask, place + BLOCK, R, LENGTH, BLOCK, left, MASKED)
        betas = gate_betas(betas, shift, seen, GATED)
        for u in tl.static_range(BLOCK):
            key, value, beta = at_place(keys, u), at_place(values, u), at_place(betas, u)
            along = beta[None, :] * tl.sum(matrix * key[:, None, :], axis=0)
            matrix = matrix * (1.0 - beta)[None, None, :] - along[None, :, :] * key[:, None, :]
            offset = write(offset, key, value, beta)

    at = program_number() * (WARP // R) + chunk
    tl.store(
        matrices + (at * (R * R * R) + i)[None, None, :] + a[None, :, None] * (R * R) + j[:, None, None] * R, matrix
    )
    if tl.program_id(2) == 0:
        tl.store(offsets + (at * (R * R) + i)[None, :] + j[:, None] * R, offset)


@triton.jit(do_not_specialize=["T", "N"])
def reads_kernel(packed, bias, mask, starts, reads, T, N, R: tl.constexpr, LENGTH: tl.constexpr,
                 BLOCK: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Replays every chunk from its start. Grid (chunks · r / 32, B·N)."""
    token, channel, left = origin(T, N, R, LENGTH)
    stride = 4 * N * R
    base = packed + token * stride + channel
    reads += token * (N * R) + channel
    if MASKED:
        mask += token
    i, chunk = lane_ids(R, T)
    j = tl.arange(0, R)
    shift = load_shift(bias, channel, i, GATED)

    at = program_number() * (WARP // R) + chunk
    s = tl.load(starts + (at * (R * R) + i)[None, :] + j[:, None] * R)
    raw_key = load_rows(base + KEY * N * R, 0, R, LENGTH, BLOCK, stride, left)
    counts = load_counts(mask, 0, R, LENGTH, BLOCK, left, MASKED)
    raw_query = load_rows(base + QUERY * N * R, 0, R, LENGTH, BLOCK, stride, left)
    for place in range(0, LENGTH, BLOCK):
        values = load_lanes(base + VALUE * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        betas = load_lanes(base + BETA * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        seen = counts_to_lanes(counts, R, BLOCK)
        keys = to_lanes(gate_rows(raw_key, counts, GATED), R, BLOCK)
        queries = to_lanes(gate_rows(raw_query, counts, GATED), R, BLOCK)
        ahead = place + BLOCK
        raw_key = load_rows(base + KEY * N * R, ahead, R, LENGTH, BLOCK, stride, left)
        counts = load_counts(mask, ahead, R, LENGTH, BLOCK, left, MASKED)
        raw_query = load_rows(base + QUERY * N * R, ahead, R, LENGTH, BLOCK, stride, left)
        betas = gate_betas(betas, shift, seen, GATED)
        for u in tl.static_range(BLOCK):
            here = chunk * LENGTH + place + u
            read = tl.sum(s * at_place(queries, u), axis=0)
            tl.store(reads + here * (N * R) + i, read, mask=here < left)
            s = write(s, at_place(keys, u), at_place(values, u), at_place(betas, u))
