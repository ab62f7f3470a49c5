"""Baselines as cells of an evaluation."""

import json

import pytest
import torch

from pipelines import evaluate as stage
from pipelines.backbones.prepared import load_backbone
from pipelines.errors import StageError
from pipelines.evaluate import evaluate
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.run.status import jobs
from pipelines.strategies.lora import make_lora, save_lora
from tests.pipelines.generated_run import prepare_run


@pytest.mark.slow
def test_they_are_evaluated_like_the_strategies(tmp_path, tiny_backbone, monkeypatch):
    task = tmp_path / "prompts.jsonl"
    asked = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    task.write_text(json.dumps(asked))
    config = prepare_run(
        tmp_path,
        tiny_backbone,
        eval_papers=2,
        strategies={
            "bm25": {"kind": "bm25", "top_k": 1, "passage_characters": 200},
            "bank": {"kind": "memory_bank", "top_k": 1, "passage_characters": 200, "summary_tokens": 4},
            "lora": {"kind": "lora", "context": True},
        },
        benchmarks={"qasper": {"from": "qasper"}, "ifeval": {"from": "ifeval", "data_file": str(task)}},
    )
    layout = Layout(config)
    assert parts.cells(config) == [("tiny-random", "lora", 42)]
    cells = {("frozen", 0), ("bm25", 0), ("bank", 0), ("lora", 42)}
    assert {(strategy, seed) for _, strategy, seed, _ in parts.evaluations(config)} == cells

    torch.manual_seed(0)
    backbone, _ = load_backbone(layout.backbone("tiny-random"))
    save_lora(make_lora(backbone, config.strategies["lora"]), layout.adapter("tiny-random", "lora", 42))
    results = {strategy: evaluate(config, "tiny-random", strategy, seed, "qasper", limit=2) for strategy, seed in cells}
    assert list(results["bm25"]["conditions"]) == list(results["bank"]["conditions"]) == ["full"]
    nll = {name: result["conditions"]["full"]["nll"]["value"] for name, result in results.items()}
    assert len({round(nll[name], 6) for name in ("frozen", "bm25", "bank")}) == 3
    assert nll["lora"] == pytest.approx(nll["frozen"], rel=1e-3)  # untrained, it changes nothing
    assert list(results["lora"]["conditions"]) == list(results["frozen"]["conditions"]) == ["none", "full"]
    harness = evaluate(config, "tiny-random", "lora", 42, "ifeval")
    assert harness["conditions"]["full"]["prompt_level_strict_acc"]["n"] == 1
    assert {"memory_bank", "full"} == set(results["bank"]["cost"]["parts"])

    class Interrupted(stage.Examiner):
        def run(self, conditions):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "Examiner", Interrupted)
        evaluate(config, "tiny-random", "bank", 0, "qasper", limit=2)
    resumed = evaluate(config, "tiny-random", "bank", 0, "qasper", limit=2)
    assert resumed["cost"]["tokens"] == results["bank"]["cost"]["tokens"], "summarising anew isn't counted twice"
    assert {job.cell[1] for job in jobs(config) if job.stage == "evaluate"} == {"frozen", "bm25", "bank", "lora"}
    with pytest.raises(StageError, match="no LoRA adapter|no adapter to evaluate"):
        layout.adapter_weights("tiny-random", "lora", 42).unlink()
        evaluate(config, "tiny-random", "lora", 42, "qasper", limit=2)
    with pytest.raises(StageError, match="'bm25' .bm25. has nothing to train"):
        config.cell("tiny-random", "bm25", 42)
