"""The training stage for real: Ray workers, a DeepSpeed engine, a worker killed in mid-run."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipelines.backbones.prepared import load_backbone, load_tokenizer
from pipelines.config import load_config, resolve_config
from pipelines.data.shards import open_episodes
from pipelines.errors import StageError
from pipelines.preprocess import preprocess
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import recipe_of
from pipelines.strategies.lora import PromptObjective, collate_prompts
from pipelines.strategies.models import load_model
from pipelines.train import train_cell
from pipelines.training.batches import Schedule

CELL = ("tiny-random", "tsw", 42)
STEPS, KILL_AT = 24, 9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A configuration of a tiny random backbone whose first two stages are done."""
    folder = tmp_path_factory.mktemp("train")
    values = {
        "name": "t", "results_dir": str(folder / "results"), "backbones": ["tiny-random"],
        "strategies": ["tsw", "context2lora", "lora_without_context"],
        "benchmarks": ["qasper"], "seeds": [42],
        "data": {"source": "generated", "generated": {"train_papers": 6, "eval_papers": 2, "facts_per_paper": 3},
                 "max_written_tokens": 512, "max_read_tokens": 128, "processes": 1},
        "train": {"max_steps": STEPS, "epochs": 99, "batch_size": 4, "num_workers": 2, "use_gpu": False,
                  "precision": "float32", "checkpoint_every": 4, "learning_rate": 0.01, "measure_memory_every": 5},
        "evaluate": {"use_gpu": False},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    subprocess.run(
        [sys.executable, "-m", "pipelines.backbone", "--config", str(path), "--backbone", "tiny-random"], check=True
    )
    preprocess(config, "tiny-random")
    return path


@pytest.fixture(scope="module")
def mixture(prepared, tmp_path_factory):
    """The same trained on a mixture of three sources: passages, chats, and facts told in conversations."""
    folder = tmp_path_factory.mktemp("mixture")
    shutil.copytree(Path(yaml.safe_load(prepared.read_text())["results_dir"]) / "t" / "backbones",
                    folder / "results" / "t" / "backbones")  # fmt: skip
    articles = [
        {"title": f"Ada {n}", "paragraphs": [{"context": f"Ada had {n} cats. They were old.", "qas": [
            {"id": f"q{n}", "question": "How many cats?", "answers": [{"text": str(n), "answer_start": 8}]}]}]}
        for n in range(7)
    ]  # fmt: skip
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    told = ("user", "I like {}."), ("assistant", "Good."), ("user", "What do I like?"), ("assistant", "You like {}.")
    chats = [{"messages": [{"role": role, "content": text.format(thing)} for role, text in told]}
             for thing in ("tea", "rain", "maps", "bread", "owls")]  # fmt: skip
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    values = yaml.safe_load(prepared.read_text())
    values |= {"results_dir": str(folder / "results"), "benchmarks": ["held_out"]}
    values["register"] = {"champion_metric": "held_out/memory_effect_nll"}
    values["data"] = {
        "sources": {
            "passages": {"kind": "squad", "train_files": [str(folder / "squad.json")], "write": "sentence"},
            "chats": {"kind": "chat", "train_files": [str(folder / "chats.jsonl")], "weight": 2},
            "told": {"kind": "generated", "told": "conversation", "train_papers": 3, "eval_papers": 2,
                     "facts_per_paper": 2},
        },
        "max_written_tokens": 512, "max_read_tokens": 128,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    preprocess(load_config(path), "tiny-random")
    return path


def kill_a_worker(curve: Path) -> None:
    """Wait until training has passed a checkpoint, then kill one of its workers."""
    while True:
        if curve.exists() and len(curve.read_text().splitlines()) > KILL_AT:
            # descendants only: another test may be training beside this one
            workers = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in p.name()]
            if workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(mixture):
    layout = Layout(load_config(mixture))
    folder = layout.adapter(*CELL)
    train_cell(load_config(mixture), *CELL)
    undisturbed = load_file(folder / "adapter_model.safetensors")
    first_curve = list(csv.DictReader((folder / "curve.csv").open()))
    (folder / "adapter_model.safetensors").unlink()

    killed = []

    def watch():
        while not (found := list(layout.train_state(*CELL).glob("run-*"))):
            time.sleep(0.05)
        kill_a_worker(found[0] / "curve.csv")
        killed.append(True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    train_cell(load_config(mixture), *CELL)
    watcher.join(1)
    assert killed, "the run ended before its worker could be killed"

    again = load_file(folder / "adapter_model.safetensors")
    assert again.keys() == undisturbed.keys()
    assert all((again[name] == undisturbed[name]).all() for name in again)
    curve = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["step"] for row in curve] == [str(i + 1) for i in range(STEPS)]
    by_source = [f"answer_nll/{source}" for source in ("passages", "chats", "told")]
    for column in ("loss", "memory_effect", *by_source):
        assert [row[column] for row in curve] == [row[column] for row in first_curve]
    looked = [int(row["step"]) for row in curve if row["memory_effect"]]
    assert looked == [1, 6, 11, 16, 21] and all(float(curve[step - 1]["memory_effect"]) != 0 for step in looked)

    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    for row in curve:  # four questions a step, so that each source has a multiple of a quarter of the mean
        found = [float(row[column]) for column in by_source if row[column]]
        assert min(found) - 1e-6 <= float(row["answer_nll"]) <= max(found) + 1e-6
    assert all(any(row[column] for row in curve) for column in by_source)
    assert any(not row[column] for row in curve for column in by_source)
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == STEPS and record["peak_memory_bytes"] > 0 and record["provenance"]["libraries"]
    assert not layout.train_state(*CELL).exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.csv", "training.json"
    ]  # fmt: skip


@pytest.fixture
def short(prepared, tmp_path):
    """The same with a shorter training, in a place of its own; call it with changed keys of the sections."""

    def make(**changes):
        values = yaml.safe_load(prepared.read_text())
        results = tmp_path / "results"
        shutil.copytree(Path(values["results_dir"]), results, ignore=shutil.ignore_patterns("train_state", "adapters"))
        values["results_dir"] = str(results)
        values["train"] |= {"max_steps": 4, "checkpoint_every": 2}
        for section, keys in changes.items():
            values[section] |= keys
        return resolve_config(values, "test")

    return make


def narrow_the_window(config, longest_left_out: int) -> int:
    """Makes the backbone's window too short for the prompts of its longest contexts; returns how many those are."""
    folder = Layout(config).backbone("tiny-random")
    episodes = open_episodes(Layout(config).data("tiny-random", "train"))
    sizes = sorted(
        prompts.input_ids.shape[1]
        for row in range(len(episodes))
        for prompts in [collate_prompts(episodes, [[row]], load_tokenizer(folder), True)]
    )
    window = sizes[-longest_left_out - 1]
    changed = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": window}
    (folder / "config.json").write_text(json.dumps(changed))
    return sum(size > window for size in sizes)


@pytest.mark.slow
def test_a_lora_goes_through_the_same_stage(short):
    config, cell = short(train={"precision": "bfloat16"}), ("tiny-random", "context2lora", 42)
    layout = Layout(config)
    folder = train_cell(config, *cell)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.csv", "training.json"
    ]  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors").values()
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in tensors)
    curve = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["step"] for row in curve] == ["1", "2", "3", "4"]
    assert all(row["loss"] == row["answer_nll"] and row["write_gate"] == row["memory_effect"] == "" for row in curve)
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == 4 and record["strategy"] == "context2lora" and "write_gate" not in record["metrics"]
    assert record["prompts_beyond_the_window"] == {"count": 0, "handled": "drop"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-random"
    assert str(layout.results) not in (folder / "README.md").read_text()
    assert not layout.train_state(*cell).exists()

    # what was saved is what was trained
    model, _, digests = load_model(config, *cell)
    recipe = recipe_of(config, config.cell(*cell))
    batch = recipe.collate(recipe.episodes()[0], [[0], [1], [2]])
    with torch.no_grad():
        trained = PromptObjective(model)(batch).loss.item()
        untrained = recipe.objective(load_backbone(layout.backbone("tiny-random"))[0])(batch).loss.item()
    assert trained < untrained and digests["adapter"]


def test_a_lora_without_context_never_sees_it(short):
    config = short()
    recipe = recipe_of(config, config.cell("tiny-random", "lora_without_context", 42))
    episodes, notes = recipe.episodes()
    assert notes == {} and len(episodes) == len(open_episodes(recipe.data))
    schedule = Schedule(episodes, config.train, 42, config.train.num_workers)
    row = episodes.slice(0, 1).to_pylist()[0]
    assert schedule.lengths[0] == len(row["question_ids"]) + len(row["answer_ids"])
    batch = recipe.collate(episodes, [[0]])
    assert batch.input_ids[0].tolist() == row["question_ids"] + row["answer_ids"]


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_prompts_beyond_the_window_are_dropped_or_cut(short, overlong):
    config = short(data={"overlong": overlong})
    count = narrow_the_window(config, longest_left_out=3)
    recipe = recipe_of(config, config.cell("tiny-random", "context2lora", 42))
    everything = open_episodes(recipe.data)
    episodes, notes = recipe.episodes()
    assert notes == {"prompts_beyond_the_window": {"count": count, "handled": overlong}} and count >= 1
    assert len(episodes) == len(everything) - (count if overlong == "drop" else 0)
    window = recipe.backbone_config.max_position_embeddings
    sizes = [recipe.collate(episodes, [[row]]).input_ids.shape[1] for row in range(len(episodes))]
    assert max(sizes) <= window
    uncut = {row["question_id"]: row["messages"] for row in everything.to_pylist()}
    changed = [row for row in episodes.to_pylist() if row["messages"] != uncut[row["question_id"]]]
    assert len(changed) == (count if overlong == "truncate" else 0)
    for row in changed:
        text, whole = (
            "\n".join(message["content"] for message in messages)
            for messages in (row["messages"], uncut[row["question_id"]])
        )
        assert text and whole.startswith(text)


def test_no_prompt_fits_the_window(short):
    config = short()
    folder = Layout(config).backbone("tiny-random")
    changed = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(StageError, match="strategies.context2lora: no training episode's context.*8 tokens; lower"):
        train_cell(config, "tiny-random", "context2lora", 42)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"use_gpu": True}, "2 GPUs were asked for and Ray finds 0 on this machine; set train.use_gpu: false"),
        ({"ray_address": "127.0.0.1:1"}, "no Ray cluster at 127.0.0.1:1"),
        ({"batch_size": 3}, "can't be dealt to 2 workers"),
    ],
    ids=["gpu", "cluster", "batch"],
)
def test_what_the_machine_cannot_do_is_said_before_training(prepared, tmp_path, change, message):
    values = yaml.safe_load(prepared.read_text())
    values["train"] |= change
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(StageError, match=message):
        train_cell(load_config(path), *CELL)
