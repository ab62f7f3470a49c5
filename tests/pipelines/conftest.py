"""A finished run in a temporary folder: real backbone and adapters, made-up episodes, curves and scores."""

import csv
import json
from pathlib import Path

import pandas
import pytest

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.config import FROZEN, Config, resolve_config
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance
from pipelines.strategies.lora import make_lora, save_lora

CONDITIONS = ("none", "state", "swapped", "full")


def interval(value: float, n: int = 40) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


class FinishedRun:
    """Writes the files that the stages before register and report leave behind."""

    def __init__(self, folder: Path, backbone: Path, **changes) -> None:
        settings = {
            "name": "finished",
            "results_dir": str(folder / "results"),
            "backbones": ["tiny-random"],
            "strategies": ["tsw", "msw"],
            "benchmarks": ["qasper"],
            "data": {"source": "generated"},
            "train": {"num_workers": 1, "use_gpu": False},
            "evaluate": {"use_gpu": False},
            **changes,
        }
        self.config: Config = resolve_config(settings, "finished run")
        self.layout = Layout(self.config)
        self.layout.backbone("tiny-random").parent.mkdir(parents=True)
        self.layout.backbone("tiny-random").symlink_to(backbone)
        for split in ("train", "eval"):
            self._json(self.layout.data_manifest("tiny-random", split), {"shards": [{"sha256": split}]})
        for number, cell in enumerate(parts.cells(self.config)):
            self.train(*cell)
            lora = self.config.strategies[cell[1]].kind == "lora"
            self.evaluate(*cell, effect=0.5 + number, conditions=("none", "full") if lora else CONDITIONS)
        self.evaluate("tiny-random", FROZEN, 0, conditions=("none", "full"))

    def train(self, backbone: str, strategy: str, seed: int) -> None:
        folder = self.layout.adapter(backbone, strategy, seed)
        base, _ = load_backbone(self.layout.backbone(backbone))
        entry = self.config.strategies[strategy]
        if entry.kind == "lora":
            save_lora(make_lora(base, entry), folder)
        else:
            get_delta_mem_model(base, DeltaMemConfig.from_dict(entry.adapter)).save_pretrained(folder)
        rows = [
            {
                "step": step,
                "loss": 3 / step,
                "answer_nll": 3 / step,
                "gradient_norm": 1.0,
                "write_gate": 0.2,
                "state_norm": step,
            }
            for step in range(1, 6)
        ]
        with self.layout.curve(backbone, strategy, seed).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        part = parts.train(self.config, backbone, strategy, seed)
        record = {"metrics": {"loss": 0.6, "step": 5}, "wall_seconds": 9.0, "peak_memory_bytes": 10**9}
        record["provenance"] = provenance(part)
        self._json(self.layout.training_record(backbone, strategy, seed), record)

    def evaluate(
        self, backbone: str, strategy: str, seed: int, effect: float = 0.0, conditions: tuple = CONDITIONS
    ) -> None:
        scores = {"none": 5.0, "state": 4.0, "swapped": 4.0 + effect, "full": 3.0}
        verdict = "better" if effect > 0.1 else "can't tell at n = 40"
        effects = {
            "memory_effect_nll": interval(effect) | {"verdict": verdict},
            "context_recovery_nll": interval(0.5),
        }
        result = {
            "benchmark": "qasper",
            "version": 1,
            "backbone": backbone,
            "strategy": strategy,
            "seed": seed,
            "conditions": {name: {"nll": interval(scores[name]), "f1": interval(0.3)} for name in conditions},
            "effects": effects if "state" in conditions else {},
            "prompts": {"full": 3, "shortened_to_the_window": 0},
            "cost": {"peak_bytes": 10**9, "parts": {"full": {"seconds": 12.5, "tokens": 10_000}}},
            "provenance": provenance(parts.evaluate(self.config, strategy, "qasper")),
        }
        self._json(self.layout.evaluation(backbone, strategy, seed, "qasper"), result)
        rows = [
            {
                "question_id": f"q{number}",
                "cluster_id": "paper",
                "category": "",
                "condition": name,
                "nll": scores[name],
                "f1": 0.3,
                "prediction": f"<b>{name}</b> answer {number}",
                "references": ["forty-two"],
            }
            for number in range(3)
            for name in conditions
        ]
        pandas.DataFrame(rows).to_parquet(self.layout.records(backbone, strategy, seed, "qasper"))

    def _json(self, path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "tiny-random"
    spec = resolve_config(
        {"name": "x", "backbones": ["tiny-random"], "strategies": ["tsw"], "benchmarks": ["qasper"]}
        | {"data": {"source": "generated"}},
        "tiny backbone",
    ).backbones["tiny-random"]
    prepare_backbone("tiny-random", spec, folder)
    return folder


@pytest.fixture
def finished_run(tmp_path, tiny_backbone):
    """Call it with changed configuration keys to get a run that is evaluated but not registered."""
    return lambda **changes: FinishedRun(tmp_path, tiny_backbone, **changes)
