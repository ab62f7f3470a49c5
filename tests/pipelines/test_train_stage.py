"""The training stage for real: Ray workers, a DeepSpeed engine, a worker killed in mid-run."""

import contextlib
import csv
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from deltamem import DeltaMemConfig, DeltaMemModel, get_delta_mem_model
from pipelines.backbones.prepared import load_backbone, load_tokenizer
from pipelines.config import config_hash, load_config, resolve_config
from pipelines.data.shards import open_episodes
from pipelines.errors import StageError
from pipelines.preprocess import preprocess
from pipelines.run import parts
from pipelines.run.layout import Layout
from pipelines.strategies.delta import LIMIT_TO_MEAN
from pipelines.strategies.kinds import recipe_of
from pipelines.strategies.lora import PromptObjective, collate_prompts
from pipelines.strategies.models import load_model
from pipelines.train import train_cell
from pipelines.training import checkpoint
from pipelines.training.forecast import FLOPS, TOKEN, Forecast
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import Schedule
from tests.mlflow_server import USER, mlflow_server
from tests.ray_head import free_port

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
        "evaluate": {"use_gpu": False}, "register": {"live": False},
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
    """The same with every further loss, on a mixture of three: passages, chats, and facts told in conversations."""
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
    values["strategies"] = {"tsw": {"adapter": {"limit_norms": True}}}
    values["register"] |= {"champion_metric": "held_out/memory_effect_nll"}
    values["train"] |= {
        "contrast": {"weight": 0.5, "until": 0.5},
        "repeat_text": {"weight": 0.5, "texts": 2, "max_tokens": 512},
        "write_after": {"texts": [0, 1], "shares": [1, 1]},
        "carry_memory": {"texts": 2, "anew_every": 4},
    }
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


def lines(curve: Path) -> int:
    return len(curve.read_text().splitlines()) if curve.exists() else 0


MOMENTS = {
    # the names of the processes tell what Ray has the workers do
    "while the workers connect": lambda name, curve: name.endswith(".init_train_context"),
    "before the first step is done": lambda name, curve: lines(curve) == 1,
    "after a checkpoint": lambda name, curve: lines(curve) > KILL_AT,
}


class Killer(threading.Thread):
    """Kills one worker at each of some moments, one after the other."""

    def __init__(self, state: Path, moments: list[str]):
        super().__init__(daemon=True)
        self.state, self.moments, self.killed = state, moments, []

    def run(self) -> None:
        for moment in self.moments:
            self._kill(MOMENTS[moment])
            self.killed.append(moment)

    def _kill(self, when) -> None:
        while True:
            curves = [folder / "curve.csv" for folder in self.state.glob("run-*")]
            # descendants only: another test may be training beside this one
            for worker in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = worker.name()
                    if "RayTrainWorker" in name and curves and when(name, curves[0]):
                        worker.kill()
                        worker.wait()
                        return
            time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(mixture):
    """The weights and the curve of two workers that nothing happens to."""
    folder = train_cell(load_config(mixture), *CELL)
    found = load_file(folder / "adapter_model.safetensors"), list(csv.DictReader((folder / "curve.csv").open()))
    shutil.rmtree(folder)
    return found


@pytest.mark.slow
def test_workers_killed_at_any_moment_change_nothing(mixture, undisturbed):
    layout, (weights, first_curve) = Layout(load_config(mixture)), undisturbed
    folder = layout.adapter(*CELL)
    config = load_config(mixture)
    assert config.train.max_failures == len(MOMENTS)  # one more would end the training
    killer = Killer(layout.train_state(*CELL), list(MOMENTS))
    killer.start()
    train_cell(config, *CELL)
    assert killer.killed == list(MOMENTS)

    again = load_file(folder / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    assert all((again[name] == weights[name]).all() for name in again)
    curve = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["step"] for row in curve] == [str(i + 1) for i in range(STEPS)]
    by_source = [f"answer_nll/{source}" for source in ("passages", "chats", "told")]
    for column in ("loss", "memory_effect", "contrast", "repeat_nll", *by_source):
        assert [row[column] for row in curve] == [row[column] for row in first_curve]
    looked = [int(row["step"]) for row in curve if row["memory_effect"]]
    assert looked == [1, 6, 11, 16, 21] and all(float(curve[step - 1]["memory_effect"]) != 0 for step in looked)

    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    for row in curve:  # four questions a step, so that each source has a multiple of a quarter of the mean
        found = [float(row[column]) for column in by_source if row[column]]
        assert min(found) - 1e-6 <= float(row["answer_nll"]) <= max(found) + 1e-6
    assert all(any(row[column] for row in curve) for column in by_source)
    assert any(not row[column] for row in curve for column in by_source)
    assert any(row["contrast"] for row in curve[: STEPS // 2])
    assert not any(row["contrast"] for row in curve[STEPS // 2 :]) and all(row["repeat_nll"] for row in curve)
    recipe, objective = recipe_of(config, config.cell(*CELL)), objective_of(config, folder)
    (episodes, _), layers = recipe.episodes(), objective.adapter.items()
    limits = torch.stack([layer.norm_limit for _, layer in layers])
    for _, layer in layers:
        layer.norm_limit = None  # as it was trained
    micro_batches = [micro for step in range(STEPS) for micro in recipe.schedule(episodes, 1).micro_batches(step, 0)]
    norms, texts = objective.sum_of_norms(recipe.collate(episodes, m.groups, m.beside) for m in micro_batches)
    torch.testing.assert_close(limits, LIMIT_TO_MEAN * norms / texts, rtol=1e-4, atol=1e-6)
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == STEPS and record["peak_memory_bytes"] > 0 and record["provenance"]["libraries"]
    assert record["workers"] == [{"count": 2, "from_step": 1}] and record["like_one_run"] == "to the bit"
    assert not layout.train_state(*CELL).exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "curve.csv", "training.json"
    ]  # fmt: skip


def fill_the_disk(curve_folder: Path) -> None:
    """Once the training has a checkpoint: no file that its worker writes may grow beyond a curve's size."""
    while True:
        for worker in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                curves = [folder / "curve.csv" for folder in curve_folder.glob("run-*")]
                if "RayTrainWorker" in worker.name() and curves and lines(curves[0]) > KILL_AT:
                    return worker.rlimit(psutil.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        time.sleep(0.005)


@pytest.mark.slow
def test_a_full_disk_stops_a_training_and_other_workers_go_on_from_the_last_whole_checkpoint(
    mixture, undisturbed, tmp_path
):
    config = shorter(mixture, tmp_path, train={"max_steps": STEPS, "checkpoint_every": 4, "num_workers": 1})
    layout = Layout(config)
    threading.Thread(target=fill_the_disk, args=[layout.train_state(*CELL)], daemon=True).start()
    with pytest.raises(StageError, match=r"No room to write in \S+run-.*Checkpoints of earlier steps are kept in"):
        train_cell(config, *CELL)
    (run,) = layout.train_state(*CELL).glob("run-*")
    last = checkpoint.newest(run)
    stopped_at = checkpoint.record(last)["step"]
    assert stopped_at >= 8
    with (last / "trainer_state.safetensors").open("r+b") as file:
        file.truncate(1000)

    values = config.model_dump(mode="json", by_alias=True)
    values["train"]["num_workers"] = 2
    folder = train_cell(resolve_config(values, "test"), *CELL)
    record = json.loads((folder / "training.json").read_text())
    assert record["workers"] == [{"count": 1, "from_step": 1}, {"count": 2, "from_step": stopped_at - 4 + 1}]
    assert record["like_one_run"] == "to rounding"
    weights, first_curve = undisturbed
    curve = curve_of(config)
    assert [row["step"] for row in curve] == [row["step"] for row in first_curve]
    for column in ("loss", "gradient_norm"):
        expected = [float(row[column]) for row in first_curve]
        assert [float(row[column]) for row in curve] == pytest.approx(expected, rel=1e-3)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=1e-3)


def shorter(prepared, folder: Path, **changes):
    """The same with a shorter training, in a place of its own, and changed keys of the sections."""
    values = yaml.safe_load(prepared.read_text())
    results = folder / "results"
    shutil.copytree(Path(values["results_dir"]), results, ignore=shutil.ignore_patterns("train_state", "adapters"))
    values["results_dir"] = str(results)
    values["train"] |= {"max_steps": 4, "checkpoint_every": 2}
    for section, keys in changes.items():
        values[section] = values[section] | keys if isinstance(values[section], dict) else keys
    return resolve_config(values, "test")


@pytest.fixture
def short(prepared, tmp_path):
    return lambda **changes: shorter(prepared, tmp_path, **changes)


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
def test_a_training_that_keeps_failing_says_how_often_it_did(short, capsys):
    config = short(train={"max_failures": 0})
    Killer(Layout(config).train_state(*CELL), ["while the workers connect"]).start()
    with pytest.raises(
        StageError, match=r"seed 42\) failed once \(train.max_failures: 0\).*run the same command again"
    ):
        train_cell(config, *CELL)
    assert not Layout(config).adapter(*CELL).exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_at_once_and_keeps_the_last_good_checkpoint(short, capsys):
    # the warm-up's first step has no learning rate, the second one half of it
    config = short(train={"learning_rate": 1e30, "warmup_ratio": 0.5, "checkpoint_every": 1, "precision": "bfloat16"})
    layout = Layout(config)
    with pytest.raises(
        StageError, match=r"loss became \S+ after step 2 of 4\. The learning rate, which rose to 5e\+29"
    ):
        train_cell(config, *CELL)
    assert "going on from the last checkpoint" not in capsys.readouterr().err
    (run,) = layout.train_state(*CELL).glob("run-*")
    kept = checkpoint.newest(run)
    assert checkpoint.record(kept)["step"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.adapter_tensors(kept).values())
    assert not layout.adapter(*CELL).exists()


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


def an_adapter(config, folder: Path, **settings) -> Path:
    base, _ = load_backbone(Layout(config).backbone("tiny-random"))
    torch.manual_seed(7)
    model = get_delta_mem_model(base, DeltaMemConfig(output_init="random", online_gain=0.5, **settings))
    model.save_pretrained(folder)
    return folder


def objective_of(config, adapter: Path) -> MemoryObjective:
    base, _ = load_backbone(Layout(config).backbone("tiny-random"))
    train = config.cell(*CELL).train
    return MemoryObjective(DeltaMemModel.from_pretrained(base, adapter, True), train.write_penalty, train.write_target)


@pytest.fixture(scope="module")
def watched(prepared, tmp_path_factory):
    """A training that starts from an adapter, and is validated, profiled and tracked."""
    folder = tmp_path_factory.mktemp("watched")
    start = an_adapter(load_config(prepared), folder / "start", limit_norms=True)
    changes = {"init_adapter": str(start), "validate_every": 2, "profile_steps": 1, "tracker": "tensorboard"}
    config = shorter(prepared, folder, train=changes, register={"live": True})
    train_cell(config, *CELL)
    return config, start


def curve_of(config) -> list[dict[str, str]]:
    return list(csv.DictReader(Layout(config).curve(*CELL).open()))


@pytest.mark.slow
def test_the_first_loss_of_a_warm_start_is_the_old_adapters(watched):
    config, start = watched
    recipe, objective = recipe_of(config, config.cell(*CELL)), objective_of(config, start)
    episodes, _ = recipe.episodes()
    schedule = recipe.schedule(episodes, 1)
    with torch.no_grad():
        losses = [
            weight * objective(recipe.collate(episodes, groups)).loss
            for groups, weight, _ in schedule.micro_batches(0, 0)
        ]
    assert float(curve_of(config)[0]["loss"]) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    record = json.loads(Layout(config).training_record(*CELL).read_text())
    assert len(record["inputs"]["init_adapter"]) == 64
    assert config_hash(parts.train(config, *CELL)) == record["inputs"]["config"]


@pytest.mark.slow
def test_validation_tells_the_likelihood_of_held_out_answers_by_source(watched):
    config, _ = watched
    nll, effect = ("validation/papers/nll", "validation/papers/memory_effect")
    rows = curve_of(config)
    assert [row["step"] for row in rows if row[nll]] == ["2", "4"]
    recipe = recipe_of(config, config.cell(*CELL))
    objective, episodes = objective_of(config, Layout(config).adapter(*CELL)), recipe.held_out()
    with torch.no_grad():
        alone = [objective(recipe.collate(episodes, [[row]])).answer_nll for row in range(len(episodes))]
    assert float(rows[-1][nll]) == pytest.approx(torch.stack(alone).mean().item(), abs=1e-4)
    assert float(rows[-1][effect]) != 0


@pytest.mark.slow
def test_a_training_is_seen_in_mlflow_and_tensorboard_while_it_runs_and_leaves_a_trace(watched):
    config, _ = watched
    layout = Layout(config)
    client = MlflowClient(layout.store)
    (run,) = client.search_runs([client.get_experiment_by_name("t").experiment_id])
    assert run.data.tags["live"] == "true" and run.info.status == "FINISHED"
    seen = client.get_metric_history(run.info.run_id, "curve/loss")
    assert [(m.step, m.value) for m in seen] == [(int(r["step"]), float(r["loss"])) for r in curve_of(config)]
    assert run.data.params["max_steps"] == "4"
    assert list(layout.tracker(*CELL).glob("events.out.tfevents.*"))
    assert json.loads(layout.trace(*CELL).read_text())["traceEvents"]


class Away(threading.Thread):
    """An MLflow server that ends in mid-training, and is started again some steps later; a context manager."""

    def __init__(self, folder: Path, state: Path):
        super().__init__()
        self.folder, self.state, self.port = folder, state, free_port()
        self.up, self.ended = threading.Event(), threading.Event()
        self.steps_without = 0
        folder.mkdir()

    def __enter__(self) -> None:
        self.start()
        self.up.wait()

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        with mlflow_server(self.folder, port=self.port):
            self.up.set()
            left_at = self._wait_for(3)
        self.steps_without = self._wait_for(KILL_AT) - left_at
        with mlflow_server(self.folder, port=self.port):
            self.ended.wait()

    def _wait_for(self, steps: int) -> int:
        done = 0
        while done < steps and not self.ended.is_set():
            done = max((lines(run / "curve.csv") - 1 for run in self.state.glob("run-*")), default=0)
            time.sleep(0.005)
        return done


@pytest.mark.slow
def test_an_mlflow_server_that_was_away_gets_the_whole_curve(prepared, tmp_path, monkeypatch):
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")  # a slow machine starts a server slowly
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    server = Away(tmp_path / "server", tmp_path / "results/t/train_state" / "/".join(CELL[:2]) / "seed42")
    address = f"http://127.0.0.1:{server.port}"
    config = shorter(
        prepared, tmp_path, train={"max_steps": STEPS, "num_workers": 1},
        register={"live": True, "tracking_uri": address},
    )  # fmt: skip
    assert server.state == Layout(config).train_state(*CELL)
    with server:
        train_cell(config, *CELL)
        client = MlflowClient(address)
        (run,) = client.search_runs([client.get_experiment_by_name("t").experiment_id])
        seen = client.get_metric_history(run.info.run_id, "curve/loss")
    assert server.steps_without > 0
    assert [(m.step, m.value) for m in seen] == [(int(r["step"]), float(r["loss"])) for r in curve_of(config)]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "its rank is 4, the strategy's 8"),
        ({"strategy": "msw", "num_states": 4}, "its num_states is 4, the strategy's 1"),
        ({"steer": ("q",)}, r"its steer is \['q'\], the strategy's \['o', 'q'\]"),
        ({"layers": (1,)}, r"its layers is \[1\], the strategy's \[0, 1\]"),
    ],
)
def test_an_adapter_of_another_shape_can_be_no_start(prepared, tmp_path, settings, message):
    start = an_adapter(load_config(prepared), tmp_path / "start", **settings)
    config = shorter(prepared, tmp_path, train={"init_adapter": str(start)})
    with pytest.raises(StageError, match=f"train.init_adapter: .*start doesn't fit strategies.tsw: {message}"):
        train_cell(config, *CELL)


def test_a_start_that_is_no_adapter_is_named(prepared, tmp_path):
    (tmp_path / "empty").mkdir()
    for cell in (CELL, ("tiny-random", "context2lora", 42)):
        config = shorter(prepared, tmp_path / cell[1], train={"init_adapter": str(tmp_path / "empty")})
        with pytest.raises(StageError, match="train.init_adapter: .*empty"):
            train_cell(config, *cell)


def test_a_forecast_counts_what_is_trained(prepared):
    config = load_config(prepared)
    recipe = recipe_of(config, config.cell(*CELL))
    forecast = Forecast.of(recipe, recipe.schedule(recipe.episodes()[0], 2))
    base, _ = load_backbone(recipe.folder)
    objective = recipe.objective(base)
    assert forecast.parameters == sum(p.numel() for p in objective.parameters())
    assert (forecast.steps, forecast.contexts) == (STEPS, 4)
    assert forecast.backbone_bytes == sum(p.numel() * p.element_size() for p in base.parameters())
    of_token = 4 * sum(p.numel() for p in base.parameters()) / FLOPS + TOKEN
    assert forecast.hours == pytest.approx(forecast.tokens * of_token / 3600)
    assert f"{forecast.parameters:,} parameters; {STEPS} steps of 4 contexts, about " in str(forecast)
    assert str(forecast).endswith("about a minute of an H100")
    assert str(replace(forecast, hours=2.25)).endswith("about 2.2 hours of an H100")
    assert str(replace(forecast, hours=0.25)).endswith("about 15 minutes of an H100")
