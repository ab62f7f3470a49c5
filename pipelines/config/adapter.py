"""A δ-mem adapter's settings as a configuration writes them, for a backbone of any depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamem.config import DeltaMemConfig
from deltamem.errors import ConfigError

THIRDS = ("first_third", "middle_third", "last_third")


def adapter_config(settings: Mapping[str, Any], depth: int) -> DeltaMemConfig:
    """The adapter's configuration on a backbone of ``depth`` layers.

    Args:
        settings: fields of ``DeltaMemConfig``; ``layers`` may also be "first_third", "middle_third" or
            "last_third".

    Raises:
        ConfigError: a value outside its domain, or an unknown field.
    """
    layers = settings.get("layers")
    if layers in THIRDS:
        part = THIRDS.index(layers)
        third = range(round(depth * part / 3), round(depth * (part + 1) / 3))
        settings = {**settings, "layers": list(third)}
    elif isinstance(layers, str):
        allowed = ", ".join(THIRDS)
        raise ConfigError(f"layers must be layer numbers, null for all, or one of {allowed}; got {layers!r}")
    return DeltaMemConfig.from_dict(dict(settings))
