"""What a long job says in a log about how far it is."""

from io import StringIO

import pytest
from rich.console import Console

from pipelines.run import progress
from pipelines.run.progress import Meter


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_was_there_before_tells_nothing_of_the_pace(clock):
    said = StringIO()
    with Meter(100, Console(file=said, width=80)) as meter:
        meter.step("training")
        for seconds, units in ((60, 0), (90, 40), (110, 10)):  # nothing yet; an earlier run's steps; ten of its own
            clock[0] = seconds
            meter.advance(units)
    assert said.getvalue().splitlines() == [
        "training: 0 of 100, 0:01:00 so far",
        "training: 40 of 100, 0:01:30 so far",
        "training: 50 of 100, 0:01:50 so far, about 0:01:40 to go",
        "training: 50 of 100, 0:01:50 so far, about 0:01:40 to go",
    ]


def test_a_line_is_never_broken(clock):
    said = StringIO()
    with Meter(10, Console(file=said, width=20)) as meter:
        meter.step("a strategy of a long name on a backbone of a longer one")
        meter.advance(10)
    assert len(said.getvalue().splitlines()) == 1
