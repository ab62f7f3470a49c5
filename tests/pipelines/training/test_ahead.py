"""What is made ahead comes in order, at most one step early, and its errors at their step."""

import threading

import pytest

from pipelines.training.ahead import one_ahead


def test_steps_come_in_order_and_the_next_is_made_while_one_is_used():
    made = {step: threading.Event() for step in range(3, 8)}

    def make(step):
        made[step].set()
        return step * step

    for step, value in one_ahead(make, range(3, 8)):
        assert value == step * step
        assert step == 7 or made[step + 1].wait(30)
        assert step >= 6 or not made[step + 2].is_set()
    assert list(one_ahead(make, range(3, 3))) == []


def test_an_error_is_raised_at_its_step():
    seen = []
    with pytest.raises(ZeroDivisionError):
        for step, value in one_ahead(lambda step: 1 // (2 - step), range(5)):
            seen.append((step, value))
    assert seen == [(0, 0), (1, 1)]
