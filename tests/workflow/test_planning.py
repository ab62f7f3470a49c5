"""Which jobs Snakemake plans, for whole runs and after changes."""

from pathlib import Path

import pytest

from pipelines import parts
from pipelines.config import load_config

PROJECT = Path(__file__).resolve().parents[2]


def test_the_papers_table_is_planned_whole(workflow):
    path = PROJECT / "configs/paper.yaml"
    planned, config = workflow.plan(config=path), load_config(path)
    assert {job for job in planned if job.startswith("Training")} == {
        f"Training {strategy} on {backbone}, seed 42"
        for backbone in ("qwen3-4b-instruct-2507", "qwen3-8b", "smollm3-3b")
        for strategy in ("tsw", "ssw", "msw")
    }
    assert {job for job in planned if job.startswith("Evaluating")} == {
        f"Evaluating {strategy} on {backbone}, seed {seed}: {benchmark}"
        for backbone, strategy, seed, benchmark in parts.evaluations(config)
    }
    assert len({job for job in planned if job.startswith("Evaluating frozen")}) == 3 * len(config.benchmarks)


@pytest.mark.parametrize("name", ["quickstart", "single_gpu"])
def test_every_configuration_can_be_planned(workflow, name):
    assert (
        sum(job.startswith("Training") for job in workflow.plan(config=PROJECT / f"configs/{name}.yaml")) == 3
    )


def test_partial_reruns(workflow):
    workflow.pretend()
    assert workflow.plan() == []

    workflow.settings["strategies"]["ssw"]["train"] = {"learning_rate": 1e-3}
    workflow.settings["train"] |= {"checkpoint_every": 3, "max_failures": 9}  # change no result
    workflow.settings["data"]["processes"] = 1
    assert sorted(workflow.plan()) == [
        "Choosing the best adapter of tiny-random",
        "Evaluating ssw on tiny-random, seed 42: qasper",
        "Registering ssw on tiny-random, seed 42",
        "Training ssw on tiny-random, seed 42",
        "Writing the report",
    ]
    workflow.settings["strategies"]["ssw"].pop("train")

    evaluated = [f"Evaluating {name} on tiny-random, seed 42: qasper" for name in ("msw", "ssw", "tsw")]
    after_evaluation = {
        "Choosing the best adapter of tiny-random",
        "Evaluating frozen on tiny-random, seed 0: qasper",
        *evaluated,
        *(f"Registering {name} on tiny-random, seed 42" for name in ("msw", "ssw", "tsw")),
        "Writing the report",
    }
    assert set(workflow.plan("--forcerun", "evaluate")) == after_evaluation
    workflow.settings["evaluate"]["batch_size"] = 3
    assert set(workflow.plan()) == after_evaluation
