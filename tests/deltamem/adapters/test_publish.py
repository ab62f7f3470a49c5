"""Adapters on a stand-in for the Hub, and what their cards say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from deltamem import DeltaMemError
from deltamem.adapters import public_release
from deltamem.adapters.evaluation_card import read_evaluation
from deltamem.adapters.files import load_adapter
from deltamem.adapters.publish import publish
from tests.hub import running_hub
from tests.paths import PROJECT
from tests.tiny_models import make_chat_model


def score(value, spread=0.1, **more):
    return {"value": value, "low": value - spread, "high": value + spread, "n": 40, "clusters": 8, **more}


EVALUATION = {
    "benchmark": "qasper",
    "version": "1",
    "strategy": "tsw",
    "seed": 3,
    "conditions": {
        "none": {"nll": score(4.0), "f1": score(0.05, 0.01)},
        "state": {"nll": score(3.0), "f1": score(0.2, 0.02)},
        "swapped": {"nll": score(3.5), "f1": score(0.1, 0.02)},
        "full": {"nll": score(2.0), "f1": {**score(0.3), "low": None, "high": None}},
    },
    "effects": {
        "memory_effect_nll": score(0.5, verdict="helps"),
        "memory_effect_f1": score(0.1, 0.03, verdict="helps"),
        "context_recovery_nll": {**score(0.5), "value": None, "note": "undefined"},
    },
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder whose adapter names a backbone on the Hub."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = make_chat_model("msw")
    model.config.base_model_name_or_path = "lab/backbone"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "qasper.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def at_hub(hub, monkeypatch):
    """The stand-in, to this process."""
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return hub


def test_the_command_publishes_what_the_hub_then_gives(adapter, evaluation, hub, tmp_path):
    """In a process of its own, as its user runs it: HF_ENDPOINT is read when the Hub's package is imported."""
    places = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    environment = {**os.environ, **places}

    def deltamem(*arguments):
        command = [sys.executable, "-c", "from deltamem.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = deltamem("publish", adapter, "user/memory", "--evaluation", evaluation, "--private")
    assert told.strip() == f"{hub.endpoint}/user/memory" and hub.visibility["user/memory"] == "private"
    assert set(hub.repos["user/memory"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    deltamem("convert", "user/memory", tmp_path / "back")
    (config, tensors), (before, expected) = load_adapter(tmp_path / "back"), load_adapter(adapter)
    assert config == before and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_card_shows_the_evaluation_with_its_controls(adapter, evaluation, at_hub):
    publish(adapter, "user/card", [evaluation], token=at_hub.token)
    card = ModelCard(at_hub.repos["user/card"]["README.md"].decode())
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert rows == [
        "| condition | nll | f1 |",
        "|---|---|---|",
        "| `none` (question, empty memory) | 4.000 [3.900, 4.100] | 0.050 [0.040, 0.060] |",
        "| `state` (question, memory written from the right history) | 3.000 [2.900, 3.100] | 0.200 [0.180, 0.220] |",
        "| `swapped` (question, memory written from another question's history) "
        "| 3.500 [3.400, 3.600] | 0.100 [0.080, 0.120] |",
        "| `full` (history and question, memory written as the history is read) | 2.000 [1.900, 2.100] | 0.300 |",
        "| *memory effect: state against swapped* | 0.500 [0.400, 0.600] | 0.100 [0.070, 0.130] |",
        "| *context recovery: (state − none) / (full − none)* | – | – |",
    ]
    assert "**qasper**: 40 questions; strategy tsw, seed 3" in card.text
    assert card.data.base_model == "lab/backbone" and card.data.library_name == "deltamem"
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown == {"nll (state)": 3.0, "f1 (state)": 0.2, "memory_effect_nll": 0.5, "memory_effect_f1": 0.1}


def test_publishing_again_replaces_the_evaluation(adapter, evaluation, at_hub, tmp_path):
    published = tmp_path / "published"
    for _ in range(2):
        publish(adapter if not published.exists() else published, "user/again", [evaluation], token=at_hub.token)
        published.mkdir(exist_ok=True)
        for name, content in at_hub.repos["user/again"].items():
            (published / name).write_bytes(content)
    assert at_hub.repos["user/again"]["README.md"].decode().count("## What it remembers") == 1


def test_a_model_publishes_itself(at_hub):
    model, _ = make_chat_model("ssw")
    address = model.push_to_hub("user/pushed", base="lab/backbone", token=at_hub.token)
    assert address == f"{at_hub.endpoint}/user/pushed"
    assert json.loads(at_hub.repos["user/pushed"]["adapter_config.json"])["base_model_name_or_path"] == "lab/backbone"


def test_a_folder_of_the_public_release_is_published_as_safetensors(adapter, at_hub, tmp_path):
    public_release.write(tmp_path / "public", *load_adapter(adapter))
    publish(tmp_path / "public", "user/converted", base="lab/backbone", token=at_hub.token)
    assert set(at_hub.repos["user/converted"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base": "/home/ada/backbone"}, "which others don't have: name its Hub id"),
        ({"repo": "not a name"}, "can't be published as not a name"),
        ({"token": "hf_wrong"}, "can't be published as user/refused"),
        ({"folder": "/no/such/folder"}, "holds no adapter"),
        ({"evaluations": ["/no/such/file.json"]}, "can't be read as an evaluation's result"),
    ],
)
def test_what_can_not_be_published_is_told_in_a_sentence(adapter, at_hub, options, message):
    arguments = {"folder": adapter, "repo": "user/refused", "token": at_hub.token, **options}
    with pytest.raises(DeltaMemError, match=message):
        publish(**{**arguments, "folder": type(adapter)(arguments["folder"])})
    assert "user/refused" not in at_hub.repos


def test_a_hub_that_does_not_answer_is_told_in_a_sentence(adapter, at_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DeltaMemError, match="can't be published as user/unreached"):
        publish(adapter, "user/unreached", token=at_hub.token)


def test_a_file_that_is_no_evaluation_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"benchmark": "qasper"}')
    with pytest.raises(DeltaMemError, match="is no evaluation's result"):
        read_evaluation(tmp_path / "x.json")
