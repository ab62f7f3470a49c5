"""One token of each of many sequences whose states lie in pages, in one compiled loop for CPUs.

A step's arithmetic is small, and as PyTorch's operations it is their number that takes time: fifteen in each layer.
"""

from __future__ import annotations

import numba  # ty: ignore[import-not-found]
import numpy as np
from torch import Tensor

TINY = np.float32(1e-12)  # as F.normalize has it
ONE = np.float32(1)
ALL = np.empty(0, np.bool_)
"""In place of a choice: every sequence is written."""


@numba.njit("void(f4[::1], f4[::1])", cache=True, error_model="numpy")
def _direction(projected, into):
    """tanh, then to length one."""
    total = np.float32(0)
    for j in range(len(into)):
        into[j] = np.tanh(projected[j])
        total += into[j] * into[j]
    into /= max(np.sqrt(total), TINY)


@numba.njit("void(f4[:, ::1], f4[::1], f4[:, :, :, :], i8[::1], b1[::1], f4[:, ::1])", cache=True, error_model="numpy")
def _step(projected, bias, pages, page, writes, reads):
    _, states, rank, _ = pages.shape
    width = states * rank
    query, key = np.empty(rank, np.float32), np.empty(rank, np.float32)
    for b in range(len(page)):
        for n in range(states):
            first = n * rank
            state = pages[page[b], n]
            _direction(projected[b, first : first + rank], query)
            _direction(projected[b, width + first : width + first + rank], key)
            for i in range(rank):
                read = predicted = np.float32(0)
                for j in range(rank):
                    read += state[i, j] * query[j]
                    predicted += state[i, j] * key[j]
                reads[b, first + i] = read
                if len(writes) == 0 or writes[b]:
                    at = first + i
                    beta = ONE / (ONE + np.exp(-(projected[b, 3 * width + at] + bias[at])))
                    correction = beta * (projected[b, 2 * width + at] - predicted)
                    for j in range(rank):
                        state[i, j] = (ONE - beta) * state[i, j] + correction * key[j]


def numba_paged_step(
    projected: Tensor, beta_bias: Tensor, pages: Tensor, page: Tensor, writes: Tensor | None, reads: Tensor
) -> None:
    """Same function as :func:`deltamem_kernels.paged.paged_step`, on a CPU.

    Here ``projected`` and ``reads`` are contiguous, ``page`` is int64 and ``beta_bias`` float32.
    """
    chosen = ALL if writes is None else writes.numpy()
    _step(projected.float().numpy(), beta_bias.numpy(), pages.numpy(), page.numpy(), chosen, reads.numpy())
