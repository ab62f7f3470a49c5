"""Which jobs Snakemake plans, for whole runs and after changes."""

import re

import pytest
import yaml

from pipelines.config import load_config
from pipelines.run import parts
from tests.paths import PROJECT

CLUSTER = PROJECT / "workflow/profiles/ray-cluster"
SLURM = PROJECT / "workflow/profiles/slurm"
SSW_ANEW = [
    "Choosing the best adapter of tiny-random",
    "Evaluating ssw on tiny-random, seed 42: qasper",
    "Registering ssw on tiny-random, seed 42",
    "Training ssw on tiny-random, seed 42",
    "Writing the report",
]
"""The jobs of a run in which one training is due, and nothing else."""


def test_the_papers_table_is_planned_whole(workflow):
    path = PROJECT / "configs/paper.yaml"
    planned, config = workflow.plan(config=path), load_config(path)
    assert {job for job in planned if job.startswith("Training")} == {
        f"Training {strategy} on {backbone}, seed 42"
        for backbone in ("qwen3-4b-instruct-2507", "qwen3-8b", "smollm3-3b")
        for strategy in ("tsw", "ssw", "msw", "context2lora", "memgen", "mlp_memory", "lora_without_context")
    }
    assert {job for job in planned if job.startswith("Evaluating")} == {
        f"Evaluating {strategy} on {backbone}, seed {seed}: {benchmark}"
        for backbone, strategy, seed, benchmark in parts.evaluations(config)
    }
    assert len({job for job in planned if job.startswith("Evaluating frozen")}) == 3 * len(config.benchmarks)


@pytest.mark.parametrize(("name", "trainings"), [("quickstart", 3), ("single_gpu", 3), ("ablations", 17)])
def test_every_configuration_can_be_planned(workflow, name, trainings):
    planned = workflow.plan(config=PROJECT / f"configs/{name}.yaml")
    assert sum(job.startswith("Training") for job in planned) == trainings


def test_one_configuration_laid_over_another(workflow):
    configs = [PROJECT / "configs" / name for name in ("ablations.yaml", "overrides/ablations_smollm2.yaml")]
    (workflow.folder / "data/qasper").mkdir(parents=True)
    for split in ("train", "dev"):
        (workflow.folder / f"data/qasper/qasper-{split}-evidence.json").touch()
    planned = workflow.plan(config=configs)
    assert "Training layers_last on smollm2-135m-instruct, seed 42" in planned
    assert len(planned) == 2 + 17 + 18 * 3 + 17 + 2  # data, training, evaluation, registration, champion and report


@pytest.mark.parametrize(
    ("visible", "limit", "shared", "spread", "evaluated"),
    [("0,1", None, 500, 2000, 333), ("0,1,2,3", 1, 500, 1000, 333), ("", 1, 500, 1000, 333), ("", None, 0, 0, 0)],
)
def test_jobs_take_shares_of_gpus(workflow, monkeypatch, visible, limit, shared, spread, evaluated):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workflow.settings["strategies"] = {
        "shared": {"from": "tsw", "train": {"gpus_per_worker": 0.5}},
        "spread": {"from": "tsw", "train": {"num_workers": 8}},
        "elsewhere": {"from": "tsw", "train": {"ray_address": "auto"}},
    }
    workflow.settings["train"]["use_gpu"] = True
    workflow.settings["evaluate"] |= {"use_gpu": True, "gpus": 0.33}
    options = ["--resources", f"gpus={limit}"] if limit else []
    planned = workflow.said_of_plan("--printshellcmds", *options)
    claims = re.findall(r"gpu_slots (\d+) \S+ -m pipelines\.(\w+) .*--strategy (\w+)", planned)
    assert {(stage, strategy): int(claim) for claim, stage, strategy in claims} == {
        ("train", "shared"): shared,
        ("train", "spread"): spread,
        ("train", "elsewhere"): 0,
        **{("evaluate", strategy): evaluated for strategy in ("frozen", "shared", "spread", "elsewhere")},
    }


def test_on_a_cluster_ray_gives_evaluations_their_gpus(workflow):
    workflow.settings["train"]["use_gpu"] = True
    workflow.settings["evaluate"] |= {"use_gpu": True, "gpus": 0.25}
    planned = workflow.said_of_plan("--printshellcmds", "--workflow-profile", str(CLUSTER))
    claims = re.findall(r"run\.(\w+ .*?) \S+ -m pipelines\.(\w+)", planned)
    assert set(claims) == {("gpu_slots 0", "train"), ("on_cluster auto 0.25", "evaluate")}
    workflow.pretend()
    # where jobs run changes nothing of what is due
    assert workflow.plan() == workflow.plan("--workflow-profile", str(CLUSTER)) == []


def test_under_slurm_jobs_take_the_gpus_that_they_get(workflow, monkeypatch):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs the extra `slurm`")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    workflow.settings["train"]["use_gpu"] = True
    workflow.settings["evaluate"] |= {"use_gpu": True, "gpus": 0.25}
    planned = workflow.said_of_plan("--printshellcmds", "--workflow-profile", str(SLURM))
    claims = re.findall(r"gpu_slots (\d+) \S+ -m pipelines\.(\w+)", planned)
    assert set(claims) == {("0", "train"), ("0", "evaluate")}


def test_the_manifest_for_kubernetes_starts_a_run_with_the_ray_of_the_lock():
    manifest = yaml.safe_load((PROJECT / "workflow/clusters/rayjob.yaml").read_text())
    cluster, command = manifest["spec"]["rayClusterSpec"], manifest["spec"]["entrypoint"].split()
    assert f"ray=={cluster['rayVersion']}" in (PROJECT / "requirements.lock").read_text().split()
    assert command[0] == "snakemake" and all((PROJECT / path).exists() for path in command if "/" in path)
    workers = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(workers["nvidia.com/gpu"]) == load_config(PROJECT / "configs/paper.yaml").train.num_workers


def test_a_strategy_may_start_from_anothers_adapter(workflow):
    start = "results/tiny/adapters/tiny-random/tsw/seed42"
    workflow.settings["strategies"]["next"] = {"from": "tsw", "train": {"init_adapter": start}}
    target = "results/tiny/adapters/tiny-random/next/seed42/training.json"
    planned = workflow.plan(target)
    assert {job for job in planned if job.startswith("Training")} == {
        "Training next on tiny-random, seed 42", "Training tsw on tiny-random, seed 42"
    }  # fmt: skip


def test_a_backbones_own_replies_are_asked_for_before_its_episodes_are_made(workflow):
    (workflow.folder / "chats.jsonl").touch()
    source = {"kind": "replies", "asked": [{"file": "chats.jsonl"}]}
    workflow.settings["data"] = {"sources": {"ordinary": source}}
    workflow.settings |= {"benchmarks": ["held_out"], "register": {"champion_metric": "held_out/memory_effect_nll"}}
    episodes = "results/tiny/data/tiny-random/train/manifest.json"
    asking = "Asking tiny-random for its own replies: ordinary"
    made = ["Fetching backbone tiny-random", "Making training and evaluation episodes for tiny-random", asking]
    assert sorted(workflow.plan(episodes)) == sorted(made)
    workflow.pretend()
    source["weight"] = 2.0
    assert not {asking, *made} & set(workflow.plan()), "how often training draws from it changes no reply"
    source["max_new_tokens"] = 50
    assert {asking, made[1]} <= set(workflow.plan()) and made[0] not in workflow.plan()


def test_a_report_of_what_was_finished_does_not_hide_what_is_missing(workflow):
    workflow.pretend()
    cell = "tiny-random/ssw/seed42"
    missing = [f"adapters/{cell}/adapter_model.safetensors", f"adapters/{cell}/training.json"]
    missing += [f"evals/{cell}/qasper.json", f"register/{cell}.json"]
    for name in missing:  # as a failed training leaves it, whose run then wrote the report
        (workflow.folder / "results/tiny" / name).unlink()
    (workflow.folder / "results/tiny/report/index.html").touch()
    assert sorted(workflow.plan()) == SSW_ANEW


def test_partial_reruns(workflow):
    workflow.pretend()
    assert workflow.plan() == []

    workflow.settings["strategies"]["ssw"]["train"] = {"learning_rate": 1e-3}
    workflow.settings["train"] |= {"checkpoint_every": 3, "max_failures": 9, "num_workers": 2}  # change no result
    workflow.settings["data"]["processes"] = 1
    assert sorted(workflow.plan()) == SSW_ANEW
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
