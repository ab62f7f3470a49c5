"""The DeepSpeed engine of one worker, and its state gathered and set as whole tensors."""

from __future__ import annotations

import math

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

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_engine(objective: nn.Module, train: Train, micro_batch: int, accumulation: int, device: torch.device):
    """A ZeRO engine over the objective's parameters; the process group is Ray's.

    torch's AdamW is passed in (fused on a GPU): DeepSpeed's own would be compiled at start-up. Its learning rate is
    set before every step, see :func:`set_learning_rate`.
    """
    # gloo needs no shared-memory extension, and there is no public way to say so; looking for it starts a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    settings = {
        **train.deepspeed,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(objective.parameters(), weight_decay=train.weight_decay, fused=device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm(engine) -> float:
    """Of the last step, before clipping; infinite where the gradient was no number, for which DeepSpeed says -1."""
    norm = float(engine.get_global_grad_norm())
    return norm if norm >= 0 else math.inf


def gather_state(engine) -> dict[str, Tensor]:
    """float32 master weights and Adam moments of every parameter, whole, on every worker (a collective call)."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"master.{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
    return tensors


def set_state(engine, tensors: dict[str, Tensor], step: int) -> None:
    """Set what :func:`gather_state` gave, on any number of workers, as the state after so many steps."""
    _create_moments(engine, step)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            master = tensors[f"master.{name}"].to(parameter.device)
            parameter.copy_(master)
            safe_set_full_fp32_param(parameter, master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}.{name}"].to(parameter.device), moment)


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
