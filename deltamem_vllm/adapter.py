"""The adapter that an engine serves."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from vllm.config import VllmConfig

from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
from deltamem.config import DeltaMemConfig
from deltamem.errors import ConfigError
from deltamem_vllm.names import ADAPTER


@lru_cache(maxsize=1)
def _load(name: str) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    return load_adapter(locate(name))


def adapter_of(vllm_config: VllmConfig) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    """The adapter's configuration and tensors.

    Raises:
        ConfigError: none is named.
        AdapterFormatError: the folder is malformed.
    """
    named = vllm_config.additional_config
    name = named.get(ADAPTER) if isinstance(named, dict) else None
    if not name:
        raise ConfigError(f'name the adapter: --additional-config \'{{"{ADAPTER}": "FOLDER"}}\'')
    return _load(str(name))


def layer_numbers(config: DeltaMemConfig, depth: int) -> tuple[int, ...]:
    """The layers that have a memory, of a backbone with ``depth`` layers.

    Raises:
        ConfigError: the adapter names a layer that the backbone lacks.
    """
    numbers = tuple(range(depth)) if config.layers is None else config.layers
    if max(numbers) >= depth:
        raise ConfigError(f"the adapter names layer {max(numbers)}, but the backbone has layers 0 to {depth - 1}")
    return numbers
