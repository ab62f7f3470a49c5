"""A run whose answers are made up but whose results are written as the evaluation stage writes them."""

import json
import math
import zlib
from pathlib import Path

import numpy as np

from pipelines.config import resolve_config
from pipelines.evaluation.records import write_parquet
from pipelines.evaluation.results import summarise
from pipelines.evaluation.statistics import Bootstrap
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance

BACKBONE = "smollm2-135m-instruct"
STRATEGIES = {
    "tsw": {"adapter": {"strategy": "tsw"}},
    "msw": {"adapter": {"strategy": "msw", "num_states": 4}},
    "bm25": {"kind": "bm25"},
    "context2lora": {"kind": "lora", "context": True},
    "lora_without_context": {"kind": "lora", "context": False},
}
BENCHMARKS = {
    "locomo": {"kind": "locomo", "version": 1, "file": "locomo10.json"},
    "hotpotqa": {"kind": "hotpotqa", "version": 1, "max_contexts": 300},
    "ifeval": {"kind": "lm_eval", "version": 1, "task": "ifeval", "metrics": ["prompt_level_strict_acc"]},
    "ttl_trec": {
        "kind": "test_time_learning",
        "version": 1,
        "dataset": "trec_fine",
        "train_file": "train.label",
        "test_file": "test.label",
        "shots": 10,
    },
}
METRICS = {
    "locomo": ("f1",),
    "hotpotqa": ("exact_match", "f1"),
    "lm_eval": ("prompt_level_strict_acc",),
    "test_time_learning": ("exact_match",),
    "memory_agent_bench": ("score",),
    "facts": ("exact_match",),
    "chat_recall": ("recalled",),
}
CATEGORIES = {
    "facts": ("1 fact", "16 facts", "2 facts", "8 facts"),
    "chat_recall": ("2 facts", "2 facts, 8 turns later", "4 facts", "4 facts, 8 turns later"),
    "locomo": ("multi_hop", "open_domain", "single_hop", "temporal"),
    "hotpotqa": ("bridge", "comparison"),
    "memory_agent_bench": ("AR/ruler_qa", "CR/factconsolidation", "LRU/detective_qa", "TTL/icl_banking77"),
}
MEANS = {"none": 0.1, "state": 0.3, "swapped": 0.2, "full": 0.5}
VALIDATED = (
    "step,loss,answer_nll,memory_effect,validation/papers/nll,validation/papers/memory_effect,validation/chat/nll\n"
    "1,3.0,3.0,0.5,,,\n2,2.0,2.0,,2.5,-0.25,\n3,1.5,1.5,,2.25,0.125,4.0\n"
)
CURVE = "step,loss,answer_nll,memory_effect,write_gate,state_norm\n1,3.0,3.0,0.5,0.2,0.1\n2,2.0,2.0,,0.2,0.3\n"


class SyntheticRun:
    """``evaluate`` writes one evaluation; ``finish`` everything of a run that the report looks for."""

    def __init__(self, folder: Path, **changes) -> None:
        settings = {
            "name": "synthetic",
            "results_dir": str(folder / "results"),
            "backbones": [BACKBONE],
            "strategies": STRATEGIES,
            "benchmarks": BENCHMARKS,
            "seeds": [42, 43],
            "data": {"source": "generated"},
            "train": {"num_workers": 1, "use_gpu": False},
            "evaluate": {"use_gpu": False, "bootstrap_samples": 300},
            "register": {"champion_metric": "locomo/memory_effect_nll"},
            **changes,
        }
        self.config = resolve_config(settings, "synthetic run")
        self.layout = Layout(self.config)

    def finish(self, questions: int = 40, clusters: int = 10) -> "SyntheticRun":
        for backbone in self.config.backbones:
            self._json(self.layout.backbone_record(backbone), {"revision": "main", "digest": "d" * 64})
            for split in ("train", "eval"):
                self._json(self.layout.data_manifest(backbone, split), {"shards": []})
        for cell in parts.cells(self.config):
            part = parts.train(self.config, *cell)
            record = {"metrics": {"step": 2}, "wall_seconds": 9.0, "peak_memory_bytes": 2**30}
            self._json(self.layout.training_record(*cell), record | {"provenance": provenance(part)})
            self.layout.adapter_weights(*cell).write_bytes(b"weights")
            self.layout.curve(*cell).write_text(CURVE)
        for *cell, benchmark in parts.evaluations(self.config):
            self.evaluate(*cell, benchmark, questions, clusters)
        return self

    def evaluate(
        self,
        backbone,
        strategy,
        seed,
        benchmark,
        questions=40,
        clusters=10,
        means=MEANS,
        prediction="Zoë <b>",
    ) -> dict:
        """Scores scatter around ``means`` (by condition); how hard a question is, all methods share."""
        kind = self.config.benchmarks[benchmark].kind
        metrics = METRICS[kind]
        records = [
            self._record(benchmark, kind, number, questions, clusters, condition, metric_means, prediction)
            for condition, metric_means in self._conditions(strategy, kind, means).items()
            for number in range(questions)
        ]
        noise = np.random.default_rng(zlib.crc32(f"{strategy}{seed}{benchmark}".encode()))
        for record in records:
            for metric in metrics:
                value = np.clip(record["mean"] + noise.normal(0, 0.05), 0, 1)
                record[metric] = float(value if kind == "locomo" or metric == "f1" else value > 0.4)
            record["nll"] = None if kind == "lm_eval" else 5 * (1 - record["mean"]) + noise.normal(0, 0.05)
            del record["mean"]
        costs = [
            {"part": part, "seconds": 2.0, "tokens": 100, "peak_bytes": 2**30}
            for part in ("write", *dict.fromkeys(record["condition"] for record in records))
        ]
        how = Bootstrap(self.config.evaluate.bootstrap_samples, self.config.evaluate.seed)
        result = {"benchmark": benchmark, "backbone": backbone, "strategy": strategy, "seed": seed}
        result |= summarise(records, costs, metrics, how)
        self._json(self.layout.evaluation(backbone, strategy, seed, benchmark), result)
        write_parquet(records, self.layout.records(backbone, strategy, seed, benchmark))
        return result

    def _conditions(self, strategy, kind, means) -> dict[str, float]:
        settings = self.config.strategies.get(strategy)
        if kind == "lm_eval" or (settings is not None and not settings.trained):
            return {"full": means["full"]}
        if settings is None or settings.kind == "lora":
            return {name: means[name] for name in ("none", "full")}
        return dict(means)

    @staticmethod
    def _record(benchmark, kind, number, questions, clusters, condition, mean, prediction) -> dict:
        categories = CATEGORIES.get(kind, ("",))
        return {
            "question_id": f"{benchmark}/{number:05}",
            "cluster_id": f"cluster {number * clusters // questions}",
            "category": categories[number % len(categories)],
            "condition": condition,
            "question": f"Who is № {number}?",
            "mean": mean + 0.1 * math.sin(number),
            "prediction": f"{prediction} {condition} {number}",
            "references": ["forty-two", "42"],
            "left_out": 0,
        }

    def _json(self, path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
