"""The DeepSpeed engine of one worker, and its state as one file that any number of workers can go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# DeepSpeed picks its device when it is imported; without a GPU it would warn on every import
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pipelines.config.sections import Train  # noqa: E402

STATE_FILE = "trainer_state.json"
TENSOR_FILE = "trainer_state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_engine(objective: nn.Module, train: Train, micro_batch: int, accumulation: int, device: torch.device):
    """A ZeRO engine over the objective's parameters; the process group is Ray's.

    torch's AdamW is passed in (fused on a GPU): DeepSpeed's own would be compiled at start-up.
    """
    # gloo needs no shared-memory extension; looking for it would start a compiler
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
    optimizer = torch.optim.AdamW(
        objective.parameters(), train.learning_rate, weight_decay=train.weight_decay, fused=device.type == "cuda"
    )
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gather_state(engine) -> dict[str, Tensor]:
    """float32 master weights and Adam moments of every parameter, whole, on every worker (a collective call)."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"master.{name}"] = safe_get_full_fp32_param(parameter).cpu()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment).cpu()
    return tensors


def save_state(folder: Path, tensors: dict[str, Tensor], step: int, record: dict[str, Any]) -> None:
    """Write a checkpoint: the gathered tensors, the random state, and the position in the data (its step)."""
    tensors["random_state"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda_random_state"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / TENSOR_FILE)
    (folder / STATE_FILE).write_text(json.dumps({"step": step, **record}), encoding="utf-8")


def load_state(folder: Path, engine) -> int:
    """Restore what :func:`save_state` wrote, on any number of workers; returns the next step."""
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / TENSOR_FILE)
    _create_moments(engine, record["step"])
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            master = tensors[f"master.{name}"].to(parameter.device)
            parameter.copy_(master)
            safe_set_full_fp32_param(parameter, master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}.{name}"].to(parameter.device), moment)
    torch.set_rng_state(tensors["random_state"])
    if torch.cuda.is_available() and "cuda_random_state" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_random_state"])
    return record["step"]


def master_weights(folder: Path) -> dict[str, Tensor]:
    """{parameter name in the adapter: float32 tensor} of a checkpoint."""
    tensors, prefix = load_file(folder / TENSOR_FILE), "master.adapter."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _create_moments(engine, step: int) -> None:
    """Adam makes its state at its first step; a resumed run needs it before, with that many steps counted."""
    zero = engine.optimizer
    for partition in zero.single_partition_of_fp32_groups:
        counter = torch.tensor(float(step), device=partition.device if partition.is_cuda else "cpu")
        zero.optimizer.state[partition] = {
            "step": counter, **{moment: torch.zeros_like(partition) for moment in MOMENTS}
        }  # fmt: skip
    zero._lazy_init_hp_params_optimizer_state()
