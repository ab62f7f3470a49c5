"""What every part of the configuration is made of."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``2e-4`` as text; whoever writes it means the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def unique(values: list[Any]) -> list[Any]:
    """Validator of a list whose values must differ."""
    if len(set(values)) != len(values):
        raise ValueError("expected every value once")
    return values


def _gpu_share(value: float) -> float:
    parts = round(1 / value) if value > 0 else 0
    if value >= 1 and value == int(value) or 2 <= parts <= 16 and abs(parts * value - 1) <= 0.011:
        return value
    raise ValueError(f"expected whole GPUs or an even share of one (0.5, 0.33, 0.25, … down to 1/16), got {value:g}")


Number = Annotated[float, BeforeValidator(_number), AfterValidator(_finite)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
GpuShare = Annotated[Number, AfterValidator(_gpu_share)]
"""A whole number of GPUs, or 1/k of one: k jobs then share it."""


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
