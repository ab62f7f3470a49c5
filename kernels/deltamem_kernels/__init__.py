"""δ-mem's recurrence: a gated delta rule on small states, read before write.

Three backends compute the same function: ``naive`` is the definition, ``torch`` is chunked PyTorch for any
device, ``triton`` is for GPUs. ``backend=None`` takes triton on CUDA tensors and torch elsewhere, unless
:func:`choose_backend` or the environment variable ``DELTAMEM_BACKEND`` says otherwise.
"""

from deltamem_kernels.attention import decode_attention, prefixed_attention
from deltamem_kernels.device import choose_backend
from deltamem_kernels.gates import gate_projections
from deltamem_kernels.products import row_products
from deltamem_kernels.scan import BACKENDS, delta_scan, gated_delta_scan, gated_read
from deltamem_kernels.step import delta_step, state_step, steer_

__all__ = [
    "BACKENDS",
    "choose_backend",
    "decode_attention",
    "delta_scan",
    "delta_step",
    "gate_projections",
    "gated_delta_scan",
    "gated_read",
    "prefixed_attention",
    "row_products",
    "state_step",
    "steer_",
]
