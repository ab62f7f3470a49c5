"""The doctor against a Hub that is there, one that refuses, and none; on this machine as it is."""

import json
import math

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.config import load_config, resolve_config
from pipelines.diagnosis.cost import estimate_costs, parameters
from pipelines.diagnosis.hub import Repository, look_up
from pipelines.diagnosis.inputs import look_at_inputs
from pipelines.diagnosis.machine import look_at_machine
from pipelines.doctor import app
from pipelines.harness.data_sets import data_set_of
from pipelines.training.forecast import FLOPS, TOKEN
from tests.hub import COMMIT, ask, running_hub
from tests.paths import PROJECT

MODEL, QASPER, GPQA = "lab/Chatty-4B", "datasets/allenai/qasper", "datasets/Idavidrein/gpqa"


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        hub.repos[MODEL] = {"config.json": b"{}", "model.safetensors": b"x" * 5000, "pytorch_model.bin": b"y" * 9000}
        hub.repos[QASPER] = {"qasper/train/0000.parquet": b"z" * 700}
        hub.revisions[QASPER] = "refs%2Fconvert%2Fparquet"
        hub.repos[GPQA] = {"gpqa_diamond.csv": b"q"}
        hub.gated.add(GPQA)
        yield hub


@pytest.fixture
def at_hub(hub, monkeypatch, tmp_path):
    ask(hub, monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    return hub


def settings(tmp_path, **changes):
    whole = {
        "name": "asked", "results_dir": str(tmp_path / "results"), "strategies": ["tsw"],
        "backbones": {"chatty": {"source": "hub", "id": MODEL, "revision": COMMIT}},
        "benchmarks": ["qasper", "gpqa_diamond", "locomo"], "data": {"source": "hub"},
        "train": {"num_workers": 1, "use_gpu": False}, "evaluate": {"use_gpu": False}, **changes,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def doctor(path):
    result = CliRunner().invoke(app, ["--configfile", str(path)], env={"COLUMNS": "220"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.output.splitlines() if "│" in line]
    return result, {(row[0], row[1]): row[2] for row in rows if len(row) == 3}


def test_it_says_what_is_missing_and_ends_with_an_error(at_hub, tmp_path):
    result, found = doctor(settings(tmp_path))
    assert result.exit_code == 1
    assert found["benchmarks.gpqa_diamond", "missing"].startswith("Idavidrein/gpqa on the Hub is gated: accept")
    assert "data/locomo/locomo10.json" in found["benchmarks.locomo", "missing"]
    assert found["backbones.chatty", "ok"].startswith(f"{MODEL} on the Hub, commit {COMMIT[:12]}")
    assert "license cc-by-4.0" in found["backbones.chatty", "ok"]
    assert "not pinned" in found["data, qasper", "note"]
    assert "chatty" in result.output and "4 B" in result.output and "things are missing" in result.output


def test_nothing_missing_is_no_error(at_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: at_hub.token)
    (tmp_path / "data/locomo").mkdir(parents=True)
    (tmp_path / "data/locomo/locomo10.json").write_text("[]")
    small = {"source": "hub", "id": MODEL.replace("4B", "4M"), "revision": "main"}
    at_hub.repos[small["id"]] = at_hub.repos[MODEL]
    result, found = doctor(settings(tmp_path, backbones={"chatty": small}))
    assert result.exit_code == 0 and "Nothing is missing." in result.output
    assert ("benchmarks.gpqa_diamond", "note") in found  # its terms are accepted; its revision isn't pinned


def test_all_that_the_papers_configurations_read_is_looked_up(at_hub):
    for name, data in (("paper", ["data, qasper"]), ("paper_release", ["data, release", "data, qasper"])):
        findings, _ = look_at_inputs(load_config(PROJECT / f"configs/{name}.yaml"))
        told = {finding.what: finding for finding in findings if " on the Hub" in finding.told}
        assert sorted(told) == sorted([
            "backbones.qwen3-4b-instruct-2507", "backbones.qwen3-8b", "backbones.smollm3-3b", *data,
            "benchmarks.hotpotqa", "benchmarks.ifeval", "benchmarks.gpqa_diamond", "benchmarks.memory_agent_bench",
            "strategies.llmlingua2",
        ])  # fmt: skip
        assert "is gated: accept" in told["benchmarks.gpqa_diamond"].told
        assert sorted(f.told.split()[3].rstrip(";") for f in findings if f.told.startswith("there is no data/")) == [
            "data/locomo/locomo10.json", "data/memory_agent_bench/entity2id.json"
        ]  # fmt: skip


def test_a_file_that_several_sources_read_is_named_once(at_hub):
    findings, _ = look_at_inputs(load_config(PROJECT / "configs/remember.yaml"))
    files = [finding.told for finding in findings if finding.what == "data"]
    assert len(files) == len(set(files)) == 6


def test_only_what_will_be_fetched_counts(at_hub):
    finding, size = look_up(Repository("model", MODEL, "model", COMMIT, ("*.safetensors", "*.json")))
    assert (finding.state, size) == ("ok", 5002)


@pytest.mark.parametrize(
    "repo_id,revision,told",
    [("lab/absent", None, "there is no lab/absent"), (MODEL, "v9", "no revision 'v9'"), ("a/b/c", None, "there is no")],
)
def test_what_the_hub_does_not_have_is_named(at_hub, repo_id, revision, told):
    finding, size = look_up(Repository("x", repo_id, "model", revision))
    assert finding.state == "missing" and told in finding.told and size is None


def test_a_hub_that_cannot_be_reached_is_said_unless_the_cache_has_it(at_hub, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "can't be reached" in look_up(Repository("x", MODEL, "model"))[0].told
    folder = tmp_path / "hub" / "models--lab--Chatty-4B"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    finding, _ = look_up(Repository("x", MODEL, "model", "main"))
    assert finding.state == "note" and "local cache" in finding.told


def test_the_machine_is_told_against_what_the_run_takes(tmp_path):
    huge = {"source": "hub", "id": "lab/Huge-9000B"}
    gpus = {"train": {"num_workers": 64}, "evaluate": {"use_gpu": True}}
    attention = {"source": "hub", "id": "lab/Small-1M", "attn_implementation": "flash_attention_2"}
    config = load_config(settings(tmp_path, backbones={"huge": huge, "small": attention}, **gpus))
    found = {f.what: f for f in look_at_machine(config, estimate_costs(config), to_fetch=2**60)}
    assert found["disk, Hub's cache"].state == found["memory"].state == found["GPUs"].state == "missing"
    assert found["disk, results"].state in ("ok", "missing") and "64 wanted" in found["GPUs"].told
    assert found["attention"].what == "attention"


def test_where_the_harness_has_its_data_from():
    assert data_set_of("gpqa_diamond_cot_zeroshot") == "Idavidrein/gpqa"
    assert data_set_of("ifeval") == "google/IFEval"
    assert data_set_of("no_such_task") is None


@pytest.mark.parametrize(
    "name,expected",
    [("Qwen/Qwen3-4B-Instruct-2507", 4e9), ("HuggingFaceTB/SmolLM3-3B", 3e9), ("x/SmolLM2-135M-Instruct", 135e6),
     ("a/llama-1.5b", 1.5e9), ("a/chat-v2", None)],
)  # fmt: skip
def test_a_backbones_size_is_that_of_its_name(name, expected):
    config = resolve_config(json.loads(json.dumps(_small(name))), "test")
    assert parameters("b", config.backbones["b"]) == expected


def _small(name):
    backbones = {"b": {"source": "hub", "id": name}}
    return {"name": "x", "backbones": backbones, "strategies": ["tsw"], "benchmarks": ["qasper"],
            "data": {"source": "generated"}}  # fmt: skip


def test_a_training_costs_four_operations_a_parameter_and_token(tmp_path):
    how = {"max_steps": 10, "batch_size": 4, "num_workers": 1, "use_gpu": False}
    config = load_config(settings(tmp_path, train=how, benchmarks=["qasper", "facts"]))
    costs = estimate_costs(config)
    (cost,) = costs.of_backbones
    assert cost.training == pytest.approx(10 * 4 * (8192 + 512) * (4 * 4e9 / FLOPS + TOKEN) / 3600)
    assert costs.uncounted == ["facts"] and costs.weight_bytes == 8e9 and cost.evaluation > 0


def test_mlp_memory_learns_each_text_once_an_epoch(tmp_path):
    strategies = {name: {"from": name, "train": {"epochs": 1}} for name in ("tsw", "mlp_memory")}
    one, both = (
        estimate_costs(load_config(settings(tmp_path, strategies={name: strategies[name] for name in names})))
        for names in (["tsw"], ["tsw", "mlp_memory"])
    )
    (one,), (both,) = one.of_backbones, both.of_backbones
    steps = {"tsw": math.ceil(2219 / 32), "mlp_memory": math.ceil(888 / 32)}
    assert both.training / one.training == pytest.approx(1 + steps["mlp_memory"] / steps["tsw"])


def test_the_papers_configurations_can_be_costed():
    for name in ("paper", "paper_release", "evidence_table", "quickstart"):
        costs = estimate_costs(load_config(PROJECT / f"configs/{name}.yaml"))
        assert all(cost.parameters and cost.jobs > 5 for cost in costs.of_backbones)
