"""A run that is killed from above: its training's driver, Snakemake itself, and what the same command does then."""

import contextlib
import csv
import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

TARGET = "results/tiny/adapters/tiny-random/tsw/seed42/training.json"
STEPS = 40


@pytest.fixture
def training(workflow):
    """A workflow with one training of some steps."""
    workflow.settings["strategies"] = ["tsw"]
    workflow.settings["data"] |= {"generated": {"train_papers": 3, "eval_papers": 2, "facts_per_paper": 2}}
    workflow.settings["data"] |= {"max_written_tokens": 512, "max_read_tokens": 128, "processes": 1}
    workflow.settings["train"] |= {"max_steps": STEPS, "epochs": 99, "batch_size": 2, "precision": "float32"}
    workflow.settings["train"] |= {"checkpoint_every": 2, "measure_memory_every": 0}
    workflow.settings["register"] = {"live": False}
    return workflow


def rows(workflow) -> list[dict[str, str]]:
    for path in workflow.folder.glob("results/tiny/train_state/tiny-random/tsw/seed42/run-*/curve.csv"):
        return list(csv.DictReader(path.open()))
    return []


@contextlib.contextmanager
def started(workflow, steps: int):
    """A run that has come so far in its training; at the end it has ended with all that it had started."""
    log = (workflow.folder / "snakemake.log").open("w")
    run = psutil.Popen(workflow.command(TARGET), cwd=workflow.folder, stdout=log, stderr=subprocess.STDOUT)
    while len(rows(workflow)) < steps:
        assert run.poll() is None, Path(log.name).read_text()
        time.sleep(0.05)
    everything = [run, *run.children(recursive=True)]
    yield run
    _, left = psutil.wait_procs(everything, timeout=120)
    assert not left, [process.name() for process in left]


@pytest.mark.slow
def test_a_training_whose_driver_and_whose_snakemake_are_killed_goes_on(training):
    with started(training, steps=5) as run:
        (driver,) = [p for p in run.children(recursive=True) if "pipelines.train" in p.cmdline()]
        driver.kill()
    text = (training.folder / "snakemake.log").read_text()
    assert "1 job failed or did not finish:\n  train tiny-random tsw seed42" in text
    assert "the same command goes on from here" in text

    first = rows(training)
    with started(training, steps=len(first) + 5) as run:
        run.kill()
    refused = training.run(TARGET)
    assert refused.returncode == 1 and "--unlock" in refused.stdout + refused.stderr
    assert training.run("--unlock").returncode == 0

    second = rows(training)
    done = training.run(TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((training.folder / TARGET).read_text())
    assert record["step"] == STEPS and record["like_one_run"] == "to the bit"
    final = list(csv.DictReader((training.folder / TARGET).with_name("curve.csv").open()))
    assert [row["step"] for row in final] == [str(step + 1) for step in range(STEPS)]
    # the time that a step took shows that it was taken once
    for before, least in ((first, 4), (second, len(first) + 4)):
        assert [row["seconds"] for row in final[:least]] == [row["seconds"] for row in before[:least]]
