"""One row times several weights: at one token a step, reading the weights is all the time there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels.device import has_triton


def row_products(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x · weightᵀ of each weight; one kernel on a GPU. Inference only.

    Args:
        x: [..., K], one row in all.
        weights: at most :data:`deltamem_kernels.device.MOST_WEIGHTS`, each [N, K], contiguous, in x's dtype.

    Returns:
        [..., N] for each weight, in x's dtype; sums are float32.
    """
    if has_triton(x):
        from deltamem_kernels.triton_products import triton_row_products

        return triton_row_products(x, weights)
    return [F.linear(x, weight) for weight in weights]
