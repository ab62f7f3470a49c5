"""The files of a checkpoint: the adapter's state whole, good for any number of workers, and the step it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltamem.tensor_files import save_tensors
from pipelines.run.files import file_digest

_RECORD = "trainer_state.json"
_TENSORS = "trainer_state.safetensors"
_DIGEST = "trainer_state.sha256"

MEASURED = "measured.adapter."
"""Begins the names of what the adapter's files have beside its weights."""


def save(folder: Path, tensors: dict[str, Tensor], step: int, record: dict[str, Any]) -> None:
    """Write a checkpoint: gathered tensors, the random state, and the position in the data (its step)."""
    tensors = {**tensors, "random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda_random_state"] = torch.cuda.get_rng_state()
    save_tensors(tensors, folder / _TENSORS)
    (folder / _DIGEST).write_text(file_digest(folder / _TENSORS), encoding="utf-8")
    (folder / _RECORD).write_text(json.dumps({"step": step, **record}), encoding="utf-8")


def newest(folder: Path) -> Path | None:
    """Of all checkpoints below a folder the one of the latest step, among those that are whole; None: there is none.

    One that was cut short, by a full disk or its writer's death, or was damaged since, is as if it weren't there.
    """
    whole = [found for found in folder.rglob("checkpoint_*") if _is_whole(found)]
    return max(whole, key=lambda found: record(found)["step"], default=None)


def _is_whole(folder: Path) -> bool:
    try:
        record(folder)
        return (folder / _DIGEST).read_text(encoding="utf-8") == file_digest(folder / _TENSORS)
    except (OSError, ValueError):
        return False


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint and its record; the random state is set to the one it was saved with."""
    tensors = load_file(folder / _TENSORS)
    torch.set_rng_state(tensors.pop("random_state"))
    cuda_state = tensors.pop("cuda_random_state", None)
    if torch.cuda.is_available() and cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state)
    return tensors, record(folder)


def record(folder: Path) -> dict[str, Any]:
    """What was recorded beside the tensors, and "step"."""
    return json.loads((folder / _RECORD).read_text(encoding="utf-8"))


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """{name in the adapter: float32 tensor}: its master weights, and what was measured of it at the end."""
    tensors = load_file(folder / _TENSORS)
    prefixes = ("master.adapter.", MEASURED)
    return {n.removeprefix(p): t for p in prefixes for n, t in tensors.items() if n.startswith(p)}
