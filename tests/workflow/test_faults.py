"""A run that is ended from above: its training's driver, Snakemake itself, and what the same command does then."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

TARGET = "results/tiny/register/tiny-random/tsw/seed42.json"
"""Needs a training, and then evaluations."""
RECORD = "results/tiny/adapters/tiny-random/tsw/seed42/training.json"
STEPS = 60


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


def locks(workflow) -> list[Path]:
    return list((workflow.folder / ".snakemake/locks").glob("*"))


def lingers(process: psutil.Process) -> bool:
    """Whether it is one of a Ray node's agents, which hold nothing and outlive their node by a minute."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "".join(process.cmdline()).strip() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return False


class Run:
    """Snakemake in a process group of its own, as a shell starts it."""

    def __init__(self, workflow) -> None:
        self._workflow, self._log = workflow, workflow.folder / "snakemake.log"
        with self._log.open("w") as said:
            self.process = psutil.Popen(
                workflow.command(TARGET), cwd=workflow.folder, stdout=said, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._everything = [self.process]

    def until(self, come: Callable[[], object]) -> None:
        while not come():
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.05)

    def has_trained(self, steps: int) -> None:
        """Waits until it has come so far."""
        self.until(lambda: len(rows(self._workflow)) >= steps)
        self._everything += [each for each in self.process.children(recursive=True) if not lingers(each)]

    def ends(self) -> str:
        """Waits for its end, and that of what it had started; returns what it said."""
        _, left = psutil.wait_procs(self._everything, timeout=120)
        assert not left, [process.name() for process in left]
        return self._log.read_text()


@contextlib.contextmanager
def started(workflow) -> Iterator[Run]:
    run = Run(workflow)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)  # where the test has failed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_whatever_has_ended_it(training):
    with started(training) as run:
        run.until(lambda: locks(training))
        second = training.run(TARGET)
        said = second.stdout + second.stderr
        assert second.returncode == 1 and "Directory cannot be locked" in said and "--unlock" in said
        run.has_trained(5)
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
        run.ends()
    assert run.process.returncode == 1 and not locks(training)

    curves = [rows(training)]
    with started(training) as run:
        run.has_trained(len(curves[-1]) + 5)
        (driver,) = [p for p in run.process.children(recursive=True) if "pipelines.train" in p.cmdline()]
        driver.kill()
        said = run.ends()
    assert "train tiny-random tsw seed42" in said and "the same command goes on from here" in said

    curves.append(rows(training))
    with started(training) as run:
        run.has_trained(len(curves[-1]) + 5)
        run.process.kill()
        run.ends()
    assert locks(training) and training.run("--unlock").returncode == 0

    curves.append(rows(training))
    with started(training) as run:
        run.has_trained(len(curves[-1]) + 5)
        run.process.terminate()
        said = run.ends()
    assert run.process.returncode == 1 and "Will exit after finishing currently running jobs" in said
    assert not (training.folder / "results/tiny/evals").exists() and not locks(training)

    record = json.loads((training.folder / RECORD).read_text())
    assert record["step"] == STEPS and record["like_one_run"] == "to the bit"
    final = list(csv.DictReader((training.folder / RECORD).with_name("curve.csv").open()))
    assert [row["step"] for row in final] == [str(step + 1) for step in range(STEPS)]
    # the time that a step took shows that it was taken once: a checkpoint at every other one
    for before in curves:
        kept = len(before) - 2 + len(before) % 2
        assert [row["seconds"] for row in final[:kept]] == [row["seconds"] for row in before[:kept]]
