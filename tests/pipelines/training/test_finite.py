"""Numbers that are none end a training, with the step and the likely cause."""

import math

import pytest

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.finite import require_finite

STEPS = 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_learning_rate_is_blamed_once_it_has_changed_something(value):
    train = Train(learning_rate=1e30, warmup_ratio=0.1)
    with pytest.raises(StageError, match=r"loss became \S+ in step 3 of 10.*rose to 1e\+30.*lower train.learning_rate"):
        require_finite({"loss": value}, "in step 3", 2, STEPS, train)


@pytest.mark.parametrize("updates", [0, 1])
def test_before_that_the_backbone_is(updates):
    """The first step of a warm-up has no learning rate."""
    with pytest.raises(StageError, match="gradient norm became inf.*dtype to float32"):
        require_finite({"loss": 2.0, "gradient norm": math.inf}, "in step 2", updates, STEPS, Train(warmup_ratio=0.1))


def test_numbers_pass():
    require_finite({"loss": 0.0, "gradient norm": 1e30}, "in step 1", 0, STEPS, Train())
