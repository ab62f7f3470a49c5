"""The training curve: what is kept of it, and who is told."""

import csv
import threading
import time

import pytest

from pipelines.training.curve import COLUMNS, Curve, Watcher, read


def row(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0 / step, **values}


def test_rows_after_the_last_checkpoint_go_and_columns_stay_empty(tmp_path):
    path = tmp_path / "curve.csv"
    curve = Curve(path, 0, more=["validation/x/nll"])
    for step in (1, 2, 3):
        curve.add(row(step, **({"validation/x/nll": 2.0} if step == 2 else {})))
    Curve(path, 2, more=["validation/x/nll"]).add(row(3))
    assert [(r["step"], r["loss"], r["validation/x/nll"], r["memory_effect"]) for r in read(path)] == [
        ("1", "1.0", "", ""), ("2", "0.5", "2.0", ""), ("3", str(1 / 3), "", "")
    ]  # fmt: skip
    assert next(csv.reader(path.open())) == [*COLUMNS, "validation/x/nll"]
    assert read(tmp_path / "none.csv") == []


class Kept:
    def __init__(self, fails_at: int = 99):
        self.fails_at, self.rows, self.ended = fails_at, [], None

    def log(self, step, values):
        if step >= self.fails_at:
            raise ConnectionError("no such host")
        self.rows.append((step, values))

    def close(self, finished):
        self.ended = finished


def test_trackers_get_every_row_and_one_that_fails_ends_nothing(tmp_path, capsys):
    good, bad = Kept(), Kept(fails_at=2)
    curve = Curve(tmp_path / "curve.csv", 0)
    with Watcher(curve.path, "tsw", 2, [bad, good]):
        curve.add(row(1))
        curve.add(row(2, memory_effect=0.25))
    assert good.rows == [(1, {"loss": 1.0}), (2, {"loss": 0.5, "memory_effect": 0.25})] and good.ended is True
    assert [step for step, _ in bad.rows] == [1] and bad.ended is None
    said = capsys.readouterr().err
    assert "Kept gets no more of this curve: no such host" in said and "tsw, loss 0.500: 2 of 2" in said


def test_a_tracker_that_was_away_gets_what_it_missed(tmp_path, capsys):
    away = Kept(fails_at=2)
    curve = Curve(tmp_path / "curve.csv", 0)
    with Watcher(curve.path, "tsw", 3, [away]):
        curve.add(row(1))
        curve.add(row(2))
        while "tried again" not in capsys.readouterr().err:
            time.sleep(0.01)
        curve.add(row(3))
        away.fails_at = 99
    assert [step for step, _ in away.rows] == [1, 2, 3] and away.ended is True
    assert "no more of this curve" not in capsys.readouterr().err


def test_a_tracker_that_takes_long_to_make_is_not_waited_for_and_gets_every_row(tmp_path):
    slow, made = Kept(), threading.Event()
    curve = Curve(tmp_path / "curve.csv", 0)
    with Watcher(curve.path, "tsw", 2, later=lambda: made.wait() and [slow]):
        curve.add(row(1))
        curve.add(row(2))
        made.set()
    assert [step for step, _ in slow.rows] == [1, 2] and slow.ended is True


def test_a_training_that_fails_is_told_as_failed(tmp_path):
    kept = Kept()
    with pytest.raises(KeyError), Watcher(tmp_path / "curve.csv", "tsw", 2, [kept]):
        raise KeyError
    assert kept.ended is False
