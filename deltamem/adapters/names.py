"""The names of an adapter's tensors in its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

INPUTS = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")
NORM_LIMIT = "norm_limit"


def tensor_name(layer: int | str, name: str) -> str:
    """Both formats name tensors alike."""
    return f"model.layers.{layer}.self_attn.{name}"


def without_limits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors but for the norms that its states may reach."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(f".{NORM_LIMIT}")}


def parameter_count(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers of an adapter's tensors are learnt."""
    return sum(tensor.numel() for tensor in without_limits(tensors).values())
