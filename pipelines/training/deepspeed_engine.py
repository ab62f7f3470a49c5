"""The DeepSpeed engine of one worker, and its state gathered and set as whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from pipelines.config import Train
from pipelines.training.one_parameter import OneParameter

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_engine(objective: nn.Module, train: Train, device: torch.device):
    """A ZeRO engine over the objective's parameters, which become one; the process group is Ray's.

    torch's AdamW is passed in (fused on a GPU): DeepSpeed's own would be compiled at start-up. Its learning rate is
    set before every step, see :func:`set_learning_rate`.
    """
    # gloo needs no shared-memory extension, and there is no public way to say so; looking for it starts a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    settings = {
        **train.deepspeed,
        "train_micro_batch_size_per_gpu": 1,  # it wants a number; what a step reads is up to learn
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    module = OneParameter(objective)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=train.weight_decay, fused=device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    module.point()  # DeepSpeed keeps parameters in a buffer of its own
    return engine


def learn(engine, micro_batches: Sequence[Any], shares: Sequence[float]) -> Iterator[Any]:
    """One optimiser step; yields what the objective returns of each micro-batch, of whose loss such a share is learnt.

    DeepSpeed is shown the last of them, with the sum of all gradients. At each backward pass that it sees it waits for
    the device and reduces, so that the next pass finds an idle GPU, and every worker waits for the slowest.
    """
    *earlier, last = zip(micro_batches, shares, strict=True)
    for micro_batch, share in earlier:
        yield engine.module.keep(share, micro_batch)
    micro_batch, share = last
    result = engine(micro_batch)
    engine.backward(result.loss * share)
    engine.step()
    yield result


def set_learning_rate(engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm(engine) -> float:
    """Of the last step, before clipping; infinite where the gradient was no number, for which DeepSpeed says -1."""
    norm = float(engine.get_global_grad_norm())
    return norm if norm >= 0 else math.inf


def gather_state(engine) -> dict[str, Tensor]:
    """float32 master weights and Adam moments of every parameter, whole, on every worker (a collective call)."""
    module: OneParameter = engine.module
    wholes = {"master": safe_get_full_fp32_param(module.whole)}
    wholes |= {moment: safe_get_full_optimizer_state(module.whole, moment) for moment in MOMENTS}
    return {
        f"{kind}.{name}": piece for kind, whole in wholes.items() for name, piece in module.pieces(whole.cpu()).items()
    }


def set_state(engine, tensors: dict[str, Tensor], step: int) -> None:
    """Set what :func:`gather_state` gave, on any number of workers, as the state after so many steps."""
    _create_moments(engine, step)
    module: OneParameter = engine.module

    def whole(kind: str) -> Tensor:
        pieces = {name.removeprefix(f"{kind}."): part for name, part in tensors.items() if name.startswith(f"{kind}.")}
        return module.join(pieces).to(module.whole.device)

    with torch.no_grad():
        master = whole("master")
        module.whole.copy_(master)
        safe_set_full_fp32_param(module.whole, master)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(module.whole, whole(moment), moment)


def _create_moments(engine, step: int) -> None:
    """Adam makes its state at its first step; a resumed run needs it before, with that many steps counted.

    DeepSpeed makes it, privately, only when it loads a checkpoint of its own, which holds for one number of workers.
    """
    zero = engine.optimizer
    for partition in zero.single_partition_of_fp32_groups:
        counter = torch.tensor(float(step), device=partition.device if partition.is_cuda else "cpu")
        zero.optimizer.state[partition] = {
            "step": counter, **{moment: torch.zeros_like(partition) for moment in MOMENTS}
        }  # fmt: skip
    zero._lazy_init_hp_params_optimizer_state()
