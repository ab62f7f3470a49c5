"""A training whose numbers are none any more ends at once, before anything of it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.learning_rate import learning_rate


def require_finite(values: Mapping[str, float], where: str, updates: int, steps: int, train: Train) -> None:
    """Check some numbers, by what they are called.

    Args:
        where: of which step, in words.
        updates: steps that the weights behind the numbers have learnt from.

    Raises:
        StageError: one is NaN or infinite; says which, where, and the likely cause.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise StageError(
                f"the {name} became {value} {where} of {steps}. {likely_cause(updates, steps, train)} Nothing of this "
                "step was saved."
            )


def likely_cause(updates: int, steps: int, train: Train) -> str:
    """What the numbers of a training that fails have most likely suffered from, and what to do, in sentences."""
    rates = [learning_rate(train, step, steps) for step in range(updates)]
    if not any(rates):
        return (
            "No step has changed the adapter before, so that the backbone's own numbers are likely to overflow: set "
            "its dtype to float32, and see whether it answers without an adapter."
        )
    return (
        f"The learning rate, which rose to {max(rates):g} until then, is likely too high: lower train.learning_rate "
        "or raise train.warmup_ratio."
    )
