"""Every benchmark that runs without a GPU still runs: on a tiny shape, for its rows and not for its figures."""

import json

from benchmarks import generation, serving, small_steps, training_step


def rows(path):
    return json.loads(path.read_text())["rows"]


def test_training_step(tmp_path):
    out = tmp_path / "rows.json"
    training_step.main(["tiny"], ["tsw", "ssw"], ["none"], written=24, read=8, repeats=1, device="cpu", out=out)
    assert [row["strategy"] for row in rows(out)] == ["backbone alone", "tsw", "ssw"]
    assert all(row["seconds"] > 0 for row in rows(out))


def test_generation(tmp_path):
    out = tmp_path / "rows.json"
    generation.main("tiny", ["tsw"], prefill=[16], context=8, batch=[2], tokens=2, repeats=1, device="cpu", out=out)
    found = {(row["what"], row["with"]) for row in rows(out)}
    assert len(found) == len(rows(out)) == 6 and all(row["value"] > 0 for row in rows(out))


def test_serving(tmp_path):
    out = tmp_path / "rows.json"
    serving.main(None, "tiny", "tsw", context=64, tokens=3, sessions=[2], repeats=1, device="cpu", out=out)
    named = {row["what"]: row for row in rows(out)}
    assert named["first token, resumed"]["tokens read"] < named["first token, from scratch"]["tokens read"]
    assert named["sessions, δ-mem"]["tokens/s"] > 0 and named["whole turns, saved"]["tokens/s"] > 0


def test_small_steps(tmp_path):
    out = tmp_path / "rows.json"
    small_steps.main("tiny", ["recipe"], ["plain", "graphed"], 1, 1, "float32", 0.1, device="cpu", out=out)
    plain, graphed = rows(out)
    assert plain["ms a step"] > 0 and plain["episodes/s"] > 0
    assert graphed["ms a step"] == "failed: RuntimeError"  # no GPU: the other ways have their figures all the same
