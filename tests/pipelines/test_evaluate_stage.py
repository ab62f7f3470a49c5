"""The evaluate stage from files to files, on generated papers and a tiny random backbone."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines import evaluate as stage
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks.answer_f1 import answer_f1
from pipelines.benchmarks.base import first_questions
from pipelines.config import resolve_config
from pipelines.errors import StageError
from pipelines.evaluate import evaluate
from pipelines.run.layout import Layout
from tests.pipelines.generated_run import prepare_run

CELL = ("tiny-random", "tsw", 42)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_backbone):
    """Backbone, episodes and an adapter."""
    config = prepare_run(tmp_path_factory.mktemp("evaluate"), tiny_backbone, eval_papers=3)
    layout = Layout(config)
    torch.manual_seed(0)
    base, _ = load_backbone(layout.backbone("tiny-random"))
    get_delta_mem_model(base, DeltaMemConfig()).save_pretrained(layout.adapter(*CELL))
    return config


@pytest.fixture
def config(prepared, tmp_path):
    """The same in a folder of its own, where things may be broken."""
    folder = tmp_path / "results"
    shutil.copytree(prepared.results_dir, folder, symlinks=True)
    return prepared.model_copy(update={"results_dir": str(folder)})


def change(config, **changes):
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


def test_a_cell(config):
    result = evaluate(config, *CELL, "qasper")
    layout = Layout(config)
    assert json.loads(layout.evaluation(*CELL, "qasper").read_text()) == result
    assert {key: result[key] for key in ("benchmark", "version", "backbone", "strategy", "seed")} == {
        "benchmark": "qasper",
        "version": "1",
        "backbone": "tiny-random",
        "strategy": "tsw",
        "seed": 42,
    }
    assert list(result["conditions"]) == ["none", "state", "swapped", "full"]
    assert set(result["effects"]) == {
        f"{effect}_{metric}" for effect in ("memory_effect", "context_recovery") for metric in ("nll", "f1")
    }
    records = pd.read_parquet(layout.records(*CELL, "qasper"))
    questions = result["conditions"]["state"]["nll"]["n"]
    assert len(records) == 4 * questions == 4 * records["question_id"].nunique()
    assert result["conditions"]["full"]["nll"]["clusters"] == records["cluster_id"].nunique() == 3
    means = records.groupby("condition")["nll"].mean()
    for condition, numbers in result["conditions"].items():
        assert numbers["nll"]["value"] == pytest.approx(means[condition])
    for row in records.itertuples():
        assert row.f1 == answer_f1(row.prediction, list(row.references))
    assert set(result["cost"]["parts"]) == {"write", "none", "state", "swapped", "full"}
    assert result["cost"]["peak_bytes"] > 2**20
    inputs = result["provenance"]["inputs"]["digests"]
    assert all(len(digest) == 64 for digest in inputs.values())
    folder = layout.evaluation(*CELL, "qasper").parent
    assert sorted(path.name for path in folder.iterdir()) == ["qasper.json", "qasper.records.parquet"]


def test_histories_written_in_pieces_leave_other_states_and_nothing_else(config):
    records = Layout(config).records(*CELL, "qasper")
    columns = ["question_id", "condition", "nll", "prediction"]

    def asked(**changes):
        evaluate(change(config, **changes), *CELL, "qasper")
        return pd.read_parquet(records, columns=columns).set_index(["condition", "question_id"]).sort_index()

    whole, in_pieces, in_one = asked(), asked(write_tokens=16), asked(write_tokens=10**6)
    assert in_one.equals(whole)
    assert in_pieces.drop(["state", "swapped"]).equals(whole.drop(["state", "swapped"]))
    assert (in_pieces.loc["state"].nll != whole.loc["state"].nll).all()


def test_one_layer_at_a_time_is_swapped_and_drawn(config):
    result = evaluate(config, *CELL, "qasper", by_layer=True)
    layout = Layout(config)
    path = layout.evaluation(*CELL, "qasper-layers")
    assert json.loads(path.read_text()) == result
    layers = sorted(map(int, result["layers"]))
    assert len(layers) > 1
    assert list(result["conditions"]) == ["state", "swapped", *(f"swapped_layer_{layer}" for layer in layers)]
    nlls = {name: numbers["nll"]["value"] for name, numbers in result["conditions"].items()}
    for layer in layers:
        expected = nlls[f"swapped_layer_{layer}"] - nlls["state"]
        assert result["layers"][str(layer)]["value"] == pytest.approx(expected) and expected != 0
    assert "<!-- layer -->" in path.with_suffix(".svg").read_text()
    assert not layout.evaluation(*CELL, "qasper").exists(), "the whole result is another one"


def test_a_model_without_memory_has_no_layers_to_swap(config):
    with pytest.raises(StageError, match="--by-layer: frozen has no memory"):
        evaluate(config, "tiny-random", "frozen", 0, "qasper", by_layer=True)


def test_the_frozen_backbone_needs_no_adapter(config):
    Layout(config).adapter_weights(*CELL).unlink()
    result = evaluate(config, "tiny-random", "frozen", 0, "qasper")
    assert list(result["conditions"]) == ["none", "full"]
    assert result["effects"] == {}
    assert result["provenance"]["inputs"]["digests"]["adapter"] is None
    assert Layout(config).evaluation("tiny-random", "frozen", 0, "qasper").is_file()


def test_an_interrupted_job_goes_on(config, monkeypatch):
    class Interrupted(stage.Examiner):
        def _ask_full(self, asked):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "Examiner", Interrupted)
        evaluate(config, *CELL, "qasper")
    layout = Layout(config)
    assert not layout.evaluation(*CELL, "qasper").exists()
    unfinished = layout.evaluation(*CELL, "qasper").with_suffix(".records.jsonl")
    kept = unfinished.read_text()
    batches = kept.count('"prediction"')

    class Counting(stage.Examiner):
        asked = 0

        def _record(self, *arguments):
            Counting.asked += 1
            return super()._record(*arguments)

    monkeypatch.setattr(stage, "Examiner", Counting)
    result = evaluate(config, *CELL, "qasper")
    questions = result["conditions"]["full"]["nll"]["n"]
    assert (batches, Counting.asked) == (3 * questions, questions)
    # another adapter must not go on with this one's answers
    unfinished.write_text(kept)
    weights = layout.adapter_weights(*CELL)
    base, _ = load_backbone(layout.backbone("tiny-random"))
    get_delta_mem_model(base, DeltaMemConfig(beta_bias_init=0.0)).save_pretrained(weights.parent)
    evaluate(config, *CELL, "qasper")
    assert Counting.asked == questions + 4 * questions


def test_a_try_lies_apart(config):
    result = evaluate(change(config, conditions=["none", "swapped"]), *CELL, "qasper", limit=4)
    layout = Layout(config)
    assert result["conditions"]["none"]["nll"]["n"] == 4
    assert result["conditions"]["none"]["nll"]["clusters"] == 3
    assert not layout.evaluation(*CELL, "qasper").exists()
    assert len(pd.read_parquet(layout.records(*CELL, "qasper-first4"))) == 8


def test_damaged_records_are_kept_and_named_and_repeated_ones_asked_once(prepared, tmp_path, capsys):
    def record(answer):
        return {
            "_id": "5a8b",
            "question": "Which animal?",
            "answer": answer,
            "type": "bridge",
            "context": [["Animals", [f"The animal is a {answer}."]]],
        }

    data = tmp_path / "hotpotqa.json"
    records = [record("cat"), record("dog"), record("cat"), {**record("fox \ud83d"), "_id": "5a8c"}, record(None)]
    data.write_text(json.dumps(records))
    entry = {"kind": "hotpotqa", "version": 1, "file": str(data)}
    settings = json.loads(prepared.to_json()) | {"benchmarks": {"hotpotqa": entry}}
    settings["register"]["champion_metric"] = "hotpotqa/memory_effect_nll"
    result = evaluate(resolve_config(settings, "test"), *CELL, "hotpotqa")
    assert result["conditions"]["state"]["nll"]["n"] == 3
    lost = f"{data}, question 4: not a HotpotQA question (its answer is null, not text)"
    assert result["records"] == {"repeated": ["5a8b"], "renamed": ["5a8b"], "lost": [lost], "mended": ["5a8c"]}
    assert "hotpotqa: 5a8b: more than once in the data" in capsys.readouterr().out


def test_first_questions_take_turns(config):
    benchmark = stage.get_benchmark(
        "qasper", config.entry("benchmarks", "qasper"), Layout(config).data("tiny-random", "eval")
    )
    contexts = list(benchmark.contexts())
    assert [len(c.questions) for c in first_questions(contexts, 4)] == [2, 1, 1]
    assert [c.context_id for c in first_questions(contexts, 2)] == [c.context_id for c in contexts[:2]]
    assert first_questions(contexts, 10**6) == contexts


def broken_adapter(layout):
    layout.adapter_weights(*CELL).write_bytes(b"no tensors")


def missing_adapter(layout):
    layout.adapter_weights(*CELL).unlink()


def corrupt_shard(layout):
    shard = next(layout.data("tiny-random", "eval").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)


def missing_episodes(layout):
    layout.data_manifest("tiny-random", "eval").unlink()


def missing_backbone(layout):
    layout.backbone("tiny-random").unlink()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (broken_adapter, "can't be used"),
        (missing_adapter, "no adapter to evaluate"),
        (corrupt_shard, "shard-00000.arrow"),
        (missing_episodes, "run the preprocess stage"),
        (missing_backbone, "not a complete backbone folder"),
    ],
)
def test_what_is_missing_or_damaged_is_named(breaking, message, config):
    breaking(Layout(config))
    with pytest.raises(StageError, match=message):
        evaluate(config, *CELL, "qasper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny-random", "tsv", 42, "qasper"), "'tsv' is not among tsw"),
        (("tiny-random", "tsw", 7, "qasper"), "7 is not among"),
        (("tiny", "tsw", 42, "qasper"), "'tiny' is not among tiny-random"),
        (("tiny-random", "tsw", 42, "locomo"), "'locomo' is not among qasper"),
    ],
)
def test_unknown_names(arguments, message, config):
    with pytest.raises(StageError, match=message):
        evaluate(config, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu(config):
    with pytest.raises(StageError, match="no CUDA device"):
        evaluate(change(config, use_gpu=True), *CELL, "qasper")


@pytest.mark.slow
def test_the_program(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    command = [sys.executable, "-m", "pipelines.evaluate", "--config", str(path), "--backbone", "tiny-random"]
    run = subprocess.run(
        [*command, "--strategy", "tsw", "--seed", "42", "--benchmark", "qasper"],
        capture_output=True,
        text=True,
        check=True,
    )
    total = json.loads(Layout(config).evaluation(*CELL, "qasper").read_text())["prompts"]["full"] * 4
    assert f"full: {total} of {total}" in run.stdout
    assert "memory_effect_nll" in run.stdout


@pytest.mark.slow
def test_a_task_of_the_harness(prepared, tmp_path):
    data = tmp_path / "prompts.jsonl"
    rows = [
        {
            "key": number,
            "prompt": f"Say {number} without a comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for number in range(3)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = json.loads(prepared.to_json())
    metrics = ["prompt_level_strict_acc", "prompt_level_loose_acc"]
    task = {"kind": "lm_eval", "version": 1, "task": "ifeval", "metrics": metrics, "data_file": str(data)}
    config = resolve_config(
        settings | {"benchmarks": {"ifeval": task}, "register": {"champion_metric": "ifeval/full/" + metrics[0]}},
        "test",
    )
    result = evaluate(config, *CELL, "ifeval", limit=2)
    assert list(result["conditions"]) == ["full"]
    assert set(result["conditions"]["full"]) == set(metrics)
    assert result["conditions"]["full"][metrics[0]]["n"] == 2
    assert result["harness"]["task"] == "ifeval"
    assert len(pd.read_parquet(Layout(config).records(*CELL, "ifeval-first2"))) == 2
