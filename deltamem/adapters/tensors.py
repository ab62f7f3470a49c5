"""The tensors of an adapter: from the layers' parameters, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem.adapters.names import INPUTS, NORM_LIMIT, tensor_name
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError
from deltamem.layer import MemoryLayers


def collect_tensors(parameters: dict[str, Tensor], config: DeltaMemConfig) -> dict[str, Tensor]:
    """Rename and split the parameters of ``DeltaMemModel.memory_layers`` (its state_dict) as the format has them."""
    tensors = {}
    for name, value in parameters.items():
        layer, _, rest = name.partition(".")
        if rest == "in_proj":
            for block_name, block in zip(INPUTS, value.split(config.width), strict=True):
                tensors[tensor_name(layer, block_name)] = block
        elif rest in ("beta_bias", NORM_LIMIT):
            tensors[tensor_name(layer, rest)] = value
        else:  # steer.<head>
            tensors[tensor_name(layer, f"delta_{rest.removeprefix('steer.')}_proj")] = value
    return tensors


def fill_layers(layers: MemoryLayers, tensors: dict[str, Tensor], config: DeltaMemConfig, where: str) -> None:
    """Copy tensors into the layers; every tensor must be there, have its shape, and be used.

    Raises:
        AdapterFormatError: names the tensor that is missing, misshapen or left over.
    """
    left = dict(tensors)

    def take(layer: str, name: str, target: Tensor) -> None:
        full = tensor_name(layer, name)
        tensor = left.pop(full, None)
        if tensor is None:
            raise AdapterFormatError(f"{where}: tensor {full} is missing")
        if tensor.shape != target.shape:
            raise AdapterFormatError(
                f"{where}: tensor {full} has shape {tuple(tensor.shape)}, the config and this backbone need "
                f"{tuple(target.shape)}; is this the backbone that the adapter was made for?"
            )
        target.copy_(tensor)

    with torch.no_grad():
        for i, layer in layers.items():
            for name, block in zip(INPUTS, layer.in_proj.split(config.width), strict=True):
                take(i, name, block)
            take(i, "beta_bias", layer.beta_bias)
            if layer.norm_limit is not None:
                take(i, NORM_LIMIT, layer.norm_limit)
            for head, weight in layer.steer.items():
                take(i, f"delta_{head}_proj", weight)
    if left:
        raise AdapterFormatError(f"{where}: {len(left)} tensors belong to no layer of this adapter: {_some(left)}")


def _some(names: dict[str, Tensor]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
