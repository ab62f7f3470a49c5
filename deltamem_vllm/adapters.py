"""The adapters that an engine serves, side by side on one backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from vllm.config import VllmConfig

from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
from deltamem.adapters.names import NORM_LIMIT, tensor_name
from deltamem.config import HEADS, DeltaMemConfig
from deltamem.errors import AdapterFormatError, ConfigError
from deltamem_vllm.names import ADAPTER


class Adapters:
    """Adapters whose weights can lie side by side: with the same rank and layers.

    Their numbers of states may differ, as those of tsw and msw do: a layer has as many as the adapter with the most
    needs, and of another adapter those beyond its own have weights of zero and stay empty. So may the heads that they
    steer: the weights of a head that an adapter doesn't steer are zero.

    Args:
        loaded: configuration and tensors, by name.
        depth: layers of the backbone.

    Attributes:
        configs: by name; the order numbers the adapters.
        tensors: in the same order.
        layers: that have a memory.
        limits: in the order of the adapters, the norms that states may have as a request begins, [layers, N] float32;
            None: any. While a prompt is read nothing is limited (:mod:`deltamem_kernels.limits` does so every 256
            tokens): where vLLM cuts prompts into parts hangs on the other requests.
        shape: configuration of the adapter with the most states and all heads that any steers, after which layers and
            pages are made.

    Raises:
        ConfigError: they differ in what they must share, or name a layer that the backbone lacks.
        AdapterFormatError: limits are missing.
    """

    def __init__(self, loaded: Mapping[str, tuple[DeltaMemConfig, dict[str, Tensor]]], depth: int):
        self.configs = {name: config for name, (config, _) in loaded.items()}
        self.tensors = [tensors for _, tensors in loaded.values()]
        steered = {head for config in self.configs.values() for head in config.steer}
        most = max(self.configs.values(), key=lambda config: config.states)
        self.shape = replace(most, steer=tuple(head for head in HEADS if head in steered))
        shared = {
            name: {"rank": config.rank, "layers": config.layers or tuple(range(depth))}
            for name, config in self.configs.items()
        }
        for (one, its), (other, others) in pairwise(shared.items()):
            for key, value in its.items():
                if value != others[key]:
                    raise ConfigError(
                        f"one engine serves adapters of the same {key}, but {one!r} has {value} and {other!r} has "
                        f"{others[key]}: start one engine for each"
                    )
        self.layers: tuple[int, ...] = shared[next(iter(shared))]["layers"]
        if max(self.layers) >= depth:
            raise ConfigError(f"the adapter names layer {max(self.layers)}, the backbone has layers 0 to {depth - 1}")
        self.limits = [self._limits(*one) for one in loaded.values()]

    def _limits(self, config: DeltaMemConfig, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if not config.limit_norms:
            return None
        names = [tensor_name(layer, NORM_LIMIT) for layer in self.layers]
        if missing := [name for name in names if name not in tensors]:
            raise AdapterFormatError(f"the adapter's tensor {missing[0]} is missing")
        return torch.stack([tensors[name].float() for name in names])

    def number(self, name: str) -> int:
        """An adapter's place in the order."""
        return list(self.configs).index(name)


def adapters_of(vllm_config: VllmConfig) -> Adapters:
    """The adapters that the engine's configuration names.

    Raises:
        ConfigError: none is named, or they can't be served by one engine.
        AdapterFormatError: a folder is malformed.
    """
    said = vllm_config.additional_config
    named = said.get(ADAPTER) if isinstance(said, dict) else None
    if not named:
        raise ConfigError(f'name the adapter: --additional-config \'{{"{ADAPTER}": "FOLDER"}}\'')
    places = {str(named): named} if not isinstance(named, dict) else named
    depth = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return _load(tuple((name, str(place)) for name, place in places.items()), depth)


@lru_cache(maxsize=1)
def _load(places: tuple[tuple[str, str], ...], depth: int) -> Adapters:
    return Adapters({name: load_adapter(locate(place)) for name, place in places}, depth)
