"""Triton kernels of the chunked scan, backward: the mirrored recurrence over the same chunks.

With g_t = dL/dS_t (row by row), g_{t-1} = (1 - β_t) g_t - β_t (g_t·k_t) k_tᵀ + dr_t q_tᵀ. A token's matrix is
symmetric, so a chunk acts on g with the transpose of its forward matrix, and only the offsets are new.
"""

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
    from_lanes,
    gate_betas,
    gate_rows,
    lane_ids,
    load_counts,
    load_lanes,
    load_rows,
    load_shift,
    origin,
    program_number,
    put_place,
    store_lanes,
    store_rows,
    to_lanes,
    ungate_rows,
    write,
)


@triton.jit
def unwrite(g, key, query, beta, seen, d_read):
    """One token back: the gradient before the token from the one after it; seen is g·k."""
    return g * (1.0 - beta)[None, :] - (beta * seen)[None, :] * key + d_read[None, :] * query


@triton.jit(do_not_specialize=["T", "N"])
def adjoint_offsets_kernel(packed, bias, mask, d_reads, offsets, T, N, R: tl.constexpr, LENGTH: tl.constexpr,
                           BLOCK: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """What the reads of each chunk add to dL/dS at its start. Grid (chunks · r / 32, B·N)."""
    token, channel, left = origin(T, N, R, LENGTH)
    stride = 4 * N * R
    base = packed + token * stride + channel
    d_reads += token * (N * R) + channel
    if MASKED:
        mask += token
    i, chunk = lane_ids(R, T)
    j = tl.arange(0, R)
    shift = load_shift(bias, channel, i, GATED)

    g = tl.zeros((R, WARP), tl.float32)
    raw_key = load_rows(base + KEY * N * R, LENGTH - BLOCK, R, LENGTH, BLOCK, stride, left)
    counts = load_counts(mask, LENGTH - BLOCK, R, LENGTH, BLOCK, left, MASKED)
    raw_query = load_rows(base + QUERY * N * R, LENGTH - BLOCK, R, LENGTH, BLOCK, stride, left)
    for back in range(BLOCK, LENGTH + BLOCK, BLOCK):
        place = LENGTH - back
        betas = load_lanes(base + BETA * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        grads = load_lanes(d_reads, place, i, chunk, LENGTH, BLOCK, N * R, left)
        seen = counts_to_lanes(counts, R, BLOCK)
        keys = to_lanes(gate_rows(raw_key, counts, GATED), R, BLOCK)
        queries = to_lanes(gate_rows(raw_query, counts, GATED), R, BLOCK)
        ahead = tl.maximum(place - BLOCK, 0)
        raw_key = load_rows(base + KEY * N * R, ahead, R, LENGTH, BLOCK, stride, left)
        counts = load_counts(mask, ahead, R, LENGTH, BLOCK, left, MASKED)
        raw_query = load_rows(base + QUERY * N * R, ahead, R, LENGTH, BLOCK, stride, left)
        betas = gate_betas(betas, shift, seen, GATED)
        for turn in tl.static_range(BLOCK):
            key = at_place(keys, BLOCK - 1 - turn)
            g = unwrite(g, key, at_place(queries, BLOCK - 1 - turn), at_place(betas, BLOCK - 1 - turn),
                        tl.sum(g * key, axis=0), at_place(grads, BLOCK - 1 - turn))  # fmt: skip

    at = program_number() * (WARP // R) + chunk
    tl.store(offsets + (at * (R * R) + i)[None, :] + j[:, None] * R, g)


@triton.jit(do_not_specialize=["T", "N"])
def gradients_kernel(packed, bias, mask, d_reads, starts, ends, past, d_packed, d_bias, T, N, R: tl.constexpr,
                     LENGTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
                     MASKED: tl.constexpr):  # fmt: skip
    """Gradients of the packed input and, a part per program, of the bias. Grid (chunks · r / 32, B·N).

    Once forwards through the chunks to note the state at every block's start, then backwards block by block. A
    program owns all rows of its states, so the sums over rows in dq and dk need no atomics.
    """
    CHUNKS: tl.constexpr = WARP // R
    token, channel, left = origin(T, N, R, LENGTH)
    stride = 4 * N * R
    base = packed + token * stride + channel
    to = d_packed + token * stride + channel
    d_reads += token * (N * R) + channel
    if MASKED:
        mask += token
    i, chunk = lane_ids(R, T)
    j = tl.arange(0, R)
    shift = load_shift(bias, channel, i, GATED)
    program = program_number()
    at = ((program * CHUNKS + chunk) * (R * R) + i)[None, :] + j[:, None] * R
    note = past + program * (LENGTH // BLOCK * R * WARP) + (j[:, None] * WARP + (chunk * R + i)[None, :])

    s = tl.load(starts + at)
    raw_key = load_rows(base + KEY * N * R, 0, R, LENGTH, BLOCK, stride, left)
    counts = load_counts(mask, 0, R, LENGTH, BLOCK, left, MASKED)
    for place in range(0, LENGTH, BLOCK):
        tl.store(note + place // BLOCK * (R * WARP), s)
        values = load_lanes(base + VALUE * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        betas = load_lanes(base + BETA * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        seen = counts_to_lanes(counts, R, BLOCK)
        keys = to_lanes(gate_rows(raw_key, counts, GATED), R, BLOCK)
        raw_key = load_rows(base + KEY * N * R, place + BLOCK, R, LENGTH, BLOCK, stride, left)
        counts = load_counts(mask, place + BLOCK, R, LENGTH, BLOCK, left, MASKED)
        betas = gate_betas(betas, shift, seen, GATED)
        for u in tl.static_range(BLOCK):
            s = write(s, at_place(keys, u), at_place(values, u), at_place(betas, u))

    g = tl.load(ends + at)
    d_shift = tl.zeros((WARP,), tl.float32)
    kind = d_packed.dtype.element_ty
    for back in range(BLOCK, LENGTH + BLOCK, BLOCK):
        place = LENGTH - back
        s = tl.load(note + place // BLOCK * (R * WARP))
        raw_key = load_rows(base + KEY * N * R, place, R, LENGTH, BLOCK, stride, left)
        counts = load_counts(mask, place, R, LENGTH, BLOCK, left, MASKED)
        raw_query = load_rows(base + QUERY * N * R, place, R, LENGTH, BLOCK, stride, left)
        values = load_lanes(base + VALUE * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        betas = load_lanes(base + BETA * N * R, place, i, chunk, LENGTH, BLOCK, stride, left)
        grads = load_lanes(d_reads, place, i, chunk, LENGTH, BLOCK, N * R, left)
        seen = counts_to_lanes(counts, R, BLOCK)
        keys = to_lanes(gate_rows(raw_key, counts, GATED), R, BLOCK)
        queries = to_lanes(gate_rows(raw_query, counts, GATED), R, BLOCK)
        grads = tl.where(seen, grads, 0.0)
        betas = gate_betas(betas, shift, seen, GATED)
        states = tl.zeros((BLOCK, R, WARP), tl.float32)
        for u in tl.static_range(BLOCK):
            states = put_place(states, u, s)
            s = write(s, at_place(keys, u), at_place(values, u), at_place(betas, u))

        d_keys, d_queries = tl.zeros((BLOCK, R, CHUNKS), tl.float32), tl.zeros((BLOCK, R, CHUNKS), tl.float32)
        d_values, d_betas = tl.zeros((BLOCK, WARP), tl.float32), tl.zeros((BLOCK, WARP), tl.float32)
        for turn in tl.static_range(BLOCK):
            key, query = at_place(keys, BLOCK - 1 - turn), at_place(queries, BLOCK - 1 - turn)
            beta, d_read = at_place(betas, BLOCK - 1 - turn), at_place(grads, BLOCK - 1 - turn)
            before = at_place(states, BLOCK - 1 - turn)
            along = tl.sum(g * key, axis=0)
            error = at_place(values, BLOCK - 1 - turn) - tl.sum(before * key, axis=0)
            d_key = (beta * error)[None, :] * g - (beta * along)[None, :] * before
            d_query = d_read[None, :] * before
            d_keys = put_place(d_keys, BLOCK - 1 - turn, tl.sum(tl.reshape(d_key, (R, CHUNKS, R)), axis=2))
            d_queries = put_place(d_queries, BLOCK - 1 - turn, tl.sum(tl.reshape(d_query, (R, CHUNKS, R)), axis=2))
            d_values = put_place(d_values, BLOCK - 1 - turn, beta * along)
            d_betas = put_place(d_betas, BLOCK - 1 - turn, error * along - tl.sum(g * before, axis=0))
            g = unwrite(g, key, query, beta, along, d_read)

        d_rows = ungate_rows(raw_key, counts, from_lanes(d_keys, R, BLOCK), GATED)
        store_rows(to + KEY * N * R, d_rows.to(kind), place, R, LENGTH, BLOCK, stride, left)
        d_rows = ungate_rows(raw_query, counts, from_lanes(d_queries, R, BLOCK), GATED)
        store_rows(to + QUERY * N * R, d_rows.to(kind), place, R, LENGTH, BLOCK, stride, left)
        if GATED:
            d_betas = d_betas * betas * (1.0 - betas)
        d_betas = tl.where(seen, d_betas, 0.0)
        d_shift += tl.sum(d_betas, axis=0)
        store_lanes(
            to + VALUE * N * R, tl.where(seen, d_values, 0.0).to(kind), place, i, chunk, LENGTH, BLOCK, stride, left
        )
        store_lanes(to + BETA * N * R, d_betas.to(kind), place, i, chunk, LENGTH, BLOCK, stride, left)
    if GATED:
        part = (tl.program_id(1).to(tl.int64) // N * tl.num_programs(0) + tl.program_id(0)) * (N * R) + channel
        tl.store(d_bias + part + j, tl.sum(tl.reshape(d_shift, (CHUNKS, R)), axis=0))
