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


Number = Annotated[float, BeforeValidator(_number), AfterValidator(_finite)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
