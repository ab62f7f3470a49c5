"""The mean of adapters: of seeds that began at the same one, or of the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltamem.adapters.files import load_adapter
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError


def average_adapters(folders: Sequence[Path]) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    """The configuration that adapters have in common, and the mean of their tensors, in float32.

    The noise of each training is averaged out, and what they agree on stays (Wortsman et al. 2022, Model soups). Only
    of adapters that share their beginning: others' weights have nothing to do with each other.

    Raises:
        AdapterFormatError: fewer than two, a folder without an adapter, or two that differ in more than their weights.
    """
    if len(folders) < 2:
        raise AdapterFormatError(f"a mean is of two adapters or more; given: {', '.join(map(str, folders)) or 'none'}")
    config, mean = load_adapter(folders[0])
    mean = {name: tensor.float() for name, tensor in mean.items()}
    for count, folder in enumerate(folders[1:], start=2):
        other_config, other = load_adapter(folder)
        ours, theirs = config.to_dict(), other_config.to_dict()
        if ours != theirs:
            told = ", ".join(f"{key} {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key])
            raise AdapterFormatError(f"{folders[0]} and {folder} can't be averaged; they have {told}")
        for name, tensor in mean.items():
            if name not in other or other[name].shape != tensor.shape:
                raise AdapterFormatError(f"{folder} has no {name} of {folders[0]}'s shape; is its file damaged?")
            mean[name] = torch.lerp(tensor, other[name].float(), 1 / count)
    return config, mean
