"""The training stage for real: Ray workers, a DeepSpeed engine, a worker killed in mid-run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from pipelines.config import load_config
from pipelines.errors import StageError
from pipelines.layout import Layout
from pipelines.preprocess import preprocess
from pipelines.train import train_cell

CELL = ("tiny-random", "tsw", 42)
STEPS, KILL_AT = 24, 9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A configuration of a tiny random backbone whose first two stages are done."""
    folder = tmp_path_factory.mktemp("train")
    values = {
        "name": "t", "results_dir": str(folder / "results"), "backbones": ["tiny-random"], "strategies": ["tsw"],
        "benchmarks": ["qasper"], "seeds": [42],
        "data": {"source": "generated", "generated": {"train_papers": 6, "eval_papers": 2, "facts_per_paper": 3},
                 "max_written_tokens": 512, "max_read_tokens": 128, "processes": 1},
        "train": {"max_steps": STEPS, "epochs": 99, "batch_size": 4, "num_workers": 2, "use_gpu": False,
                  "precision": "float32", "checkpoint_every": 4, "learning_rate": 0.01},
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


def kill_a_worker(curve: Path) -> None:
    """Wait until training has passed a checkpoint, then kill one of its workers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if curve.exists() and len(curve.read_text().splitlines()) > KILL_AT:
            # descendants only: another test may be training beside this one
            workers = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in p.name()]
            if workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                return
        time.sleep(0.02)
    raise TimeoutError("no training worker to kill")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(prepared, monkeypatch):
    import threading

    layout = Layout(load_config(prepared))
    folder = layout.adapter(*CELL)
    train_cell(load_config(prepared), *CELL)
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
    train_cell(load_config(prepared), *CELL)
    watcher.join(1)
    assert killed, "the run ended before its worker could be killed"

    again = load_file(folder / "adapter_model.safetensors")
    assert again.keys() == undisturbed.keys()
    assert all((again[name] == undisturbed[name]).all() for name in again)
    curve = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["step"] for row in curve] == [str(i + 1) for i in range(STEPS)]
    assert [row["loss"] for row in curve] == [row["loss"] for row in first_curve]

    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == STEPS and record["peak_memory_bytes"] > 0 and record["provenance"]["libraries"]
    assert not layout.train_state(*CELL).exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.csv", "training.json"
    ]  # fmt: skip


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
