"""The files of a checkpoint: the adapter's state whole, good for any number of workers, and the step it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_RECORD = "trainer_state.json"
_TENSORS = "trainer_state.safetensors"


def save(folder: Path, tensors: dict[str, Tensor], step: int, record: dict[str, Any]) -> None:
    """Write a checkpoint: gathered tensors, the random state, and the position in the data (its step)."""
    tensors = {**tensors, "random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda_random_state"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / _TENSORS)
    (folder / _RECORD).write_text(json.dumps({"step": step, **record}), encoding="utf-8")


def load(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a checkpoint and the next step; the random state is set to the one it was saved with."""
    tensors = load_file(folder / _TENSORS)
    torch.set_rng_state(tensors.pop("random_state"))
    cuda_state = tensors.pop("cuda_random_state", None)
    if torch.cuda.is_available() and cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state)
    return tensors, record(folder)["step"]


def record(folder: Path) -> dict[str, Any]:
    """What was recorded beside the tensors, and "step"."""
    return json.loads((folder / _RECORD).read_text(encoding="utf-8"))


def master_weights(folder: Path) -> dict[str, Tensor]:
    """{parameter name in the adapter: float32 tensor}."""
    tensors, prefix = load_file(folder / _TENSORS), "master.adapter."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
