"""Registration in a real MLflow store in a temporary folder."""

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, event

from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
from deltamem.errors import AdapterFormatError
from pipelines.backbones.prepared import load_backbone
from pipelines.errors import StageError
from pipelines.registry.model_folder import ADAPTER_FILES
from pipelines.registry.registration import choose_champion, register_cell
from pipelines.strategies.lora import load_lora
from tests.pipelines.synthetic_run import VALIDATED

CELL = ("tiny-random", "tsw", 42)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """MLflow's database before anything is in it; it takes seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def finished_run(finished_run, empty_store):
    def make(**changes):
        run = finished_run(**changes)
        shutil.copy(empty_store, run.layout.results / "mlflow.db")
        return run

    return make


@pytest.fixture
def registered(finished_run):
    run = finished_run()
    for strategy in run.config.strategies:
        register_cell(run.config, "tiny-random", strategy, 42)
    choose_champion(run.config, "tiny-random")
    uri = run.layout.store
    return run, MlflowClient(uri, uri)


def test_a_cell_becomes_a_run_and_a_version(registered):
    run, client = registered
    version = client.get_model_version_by_alias("deltamem-tiny-random-tsw", "champion")
    logged = client.get_run(version.run_id)
    assert logged.data.params["learning_rate"] == "0.0002"
    assert logged.data.params["adapter.strategy"] == "tsw"
    assert logged.data.metrics["qasper/state/nll"] == 4.0
    assert logged.data.metrics["qasper/memory_effect_nll/low"] == pytest.approx(0.4)
    history = client.get_metric_history(version.run_id, "curve/loss")
    assert [(point.step, point.value) for point in history][:2] == [(1, 3.0), (2, 1.5)]
    record = json.loads(run.layout.backbone_record("tiny-random").read_text())
    assert version.tags["backbone_digest"] == record["digest"]
    assert {"config_hash", "commit", "data_digest", "adapter_digest", "backbone_revision"} <= set(version.tags)
    assert [file.path for file in client.list_artifacts(version.run_id, "evals")] == [
        "evals/qasper.json",
        "evals/qasper.records.parquet",
    ]


def test_a_runs_curve_has_its_validations_and_its_tags_the_adapter_it_started_from(finished_run):
    run = finished_run(strategies=["tsw"])
    run.layout.curve(*CELL).write_text(VALIDATED)
    path = run.layout.training_record(*CELL)
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": {"init_adapter": "a" * 64}}))
    record = register_cell(run.config, *CELL)
    uri = run.layout.store
    client = MlflowClient(uri, uri)
    history = client.get_metric_history(record["run_id"], "curve/validation/papers/nll")
    assert [(point.step, point.value) for point in history] == [(2, 2.5), (3, 2.25)]
    assert client.get_run(record["run_id"]).data.tags["init_adapter"] == "a" * 64


def test_the_backbones_champion_is_its_best_cell(registered):
    run, client = registered
    best = client.get_model_version_by_alias("deltamem-tiny-random", "champion")
    assert best.tags["strategy"] == "msw"
    choice = json.loads(run.layout.champion("tiny-random").read_text())
    assert (choice["strategy"], choice["score"]) == ("msw", 1.5)


def test_lower_can_be_better(finished_run):
    run = finished_run(register={"champion_metric": "qasper/swapped/nll", "higher_is_better": False})
    for strategy in run.config.strategies:
        register_cell(run.config, "tiny-random", strategy, 42)
    assert choose_champion(run.config, "tiny-random")["strategy"] == "tsw"


def test_registering_again_makes_no_second_version(registered):
    run, client = registered
    run.evaluate(*CELL, effect=7.0)
    record = register_cell(run.config, *CELL)
    champion = choose_champion(run.config, "tiny-random")
    assert (record["version"], champion["strategy"], champion["version"]) == ("1", "tsw", "2")
    assert len(client.search_model_versions("name = 'deltamem-tiny-random-tsw'")) == 1
    assert client.get_run(record["run_id"]).data.metrics["qasper/memory_effect_nll"] == 7.0
    assert len(client.get_metric_history(record["run_id"], "curve/loss")) == 5


def test_a_new_evaluation_counts_though_the_clock_was_set_back(registered, monkeypatch):
    run, client = registered
    run.evaluate(*CELL, effect=0.25)
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_ago)
    record = register_cell(run.config, *CELL)
    assert client.get_run(record["run_id"]).data.metrics["qasper/memory_effect_nll"] == 0.25


def test_a_changed_adapter_makes_a_new_version(registered):
    run, _ = registered
    card = run.layout.adapter(*CELL) / "adapter_config.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "alpha": 8.0}))
    assert register_cell(run.config, *CELL)["version"] == "2"


def change_weights(run, cell, change):
    weights = run.layout.adapter_weights(*cell)
    save_file({name: change(tensor) for name, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_all_numbers_is_not_registered(finished_run, value):
    run = finished_run(strategies=["tsw"])
    change_weights(run, CELL, lambda tensor: tensor.index_fill(0, torch.tensor([0]), value))
    with pytest.raises(StageError, match=r"adapter_model.safetensors: (\d+) of \1 tensors .*lower train.learning_rate"):
        register_cell(run.config, *CELL)
    uri = run.layout.store
    assert MlflowClient(uri, uri).search_registered_models() == []


def test_a_broken_off_run_is_made_anew(finished_run):
    run = finished_run()
    curve = run.layout.curve(*CELL).read_text()
    run.layout.curve(*CELL).write_text("step,loss\n1,broken")
    with pytest.raises(ValueError, match="broken"):
        register_cell(run.config, *CELL)
    run.layout.curve(*CELL).write_text(curve)
    record = register_cell(run.config, *CELL)
    client = MlflowClient(run.layout.store)
    runs = client.search_runs([client.get_experiment_by_name("finished").experiment_id])
    assert [found.info.run_id for found in runs] == [record["run_id"]]


def test_the_best_seed_is_the_strategys_champion(finished_run):
    run = finished_run(seeds=[1, 2], strategies=["tsw"])
    run.evaluate("tiny-random", "tsw", 1, effect=9.0)
    change_weights(run, ("tiny-random", "tsw", 2), lambda tensor: tensor + 1)
    for seed in (1, 2):
        register_cell(run.config, "tiny-random", "tsw", seed)
    client = MlflowClient(run.layout.store)
    assert client.get_model_version_by_alias("deltamem-tiny-random-tsw", "champion").tags["seed"] == "1"


LOAD_ELSEWHERE = """
import sys
from pathlib import Path
import mlflow, torch
from deltamem import DeltaMemModel
from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
from deltamem.errors import AdapterFormatError
from pipelines.backbones.prepared import load_backbone

uri, name, folder = sys.argv[1:]
mlflow.set_tracking_uri(uri)
chat = mlflow.pyfunc.load_model(f"models:/{name}@champion")
reply = chat.predict([{"role": "user", "content": "What is it?"}], params={"max_new_tokens": 4})
assert isinstance(reply, str)
model = DeltaMemModel.from_pretrained(load_backbone(folder)[0], f"models:/{name}@champion")
print(model.config.strategy)
"""


@pytest.mark.slow
def test_another_process_loads_the_champion(registered):
    run, _ = registered
    arguments = [run.layout.store, "deltamem-tiny-random", str(run.layout.backbone("tiny-random"))]
    environment = {
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "PATH": "",
        "HOME": str(run.layout.root),
    }
    result = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "msw"


def test_a_moved_backbone_is_named(registered):
    run, _ = registered
    mlflow.set_tracking_uri(run.layout.store)
    elsewhere = {"backbone": str(run.layout.root / "elsewhere")}
    with pytest.raises(StageError, match="backbone is not at .*elsewhere"):
        mlflow.pyfunc.load_model("models:/deltamem-tiny-random@champion", model_config=elsewhere)


def test_a_model_whose_files_moved_is_not_said_to_be_missing(registered, tmp_path):
    run, _ = registered
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run.layout.results, elsewhere)
    uri, store = "models:/deltamem-tiny-random@champion", f"sqlite:///{elsewhere / 'mlflow.db'}"
    with pytest.raises(AdapterFormatError, match=f"no longer in {run.layout.results}.*they are in {elsewhere}") as told:
        locate(uri, store)
    folder = re.search(r"they are in (\S+) now", str(told.value))[1]
    assert load_adapter(locate(folder))[0].strategy == "msw"
    shutil.rmtree(elsewhere / "mlflow_artifacts")
    with pytest.raises(AdapterFormatError, match="is registered, but its files.*register the adapter again"):
        locate(uri, store)
    with pytest.raises(AdapterFormatError, match="was not found in the MLflow registry"):
        locate("models:/deltamem-tiny-random@best", store)


def test_a_locked_store_is_named(finished_run, empty_store, tmp_path):
    store = tmp_path / "store.db"
    shutil.copy(empty_store, store)
    run = finished_run(register={"tracking_uri": f"sqlite:///{store}"})

    def wait_less(connection, cursor, statement, parameters, context, many):  # MLflow sets 20 s in every session
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", wait_less, retval=True)
    database = sqlite3.connect(store)
    database.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StageError, match=r"sqlite:///.*store\.db.*locked by another program"):
            register_cell(run.config, *CELL)
    finally:
        event.remove(Engine, "before_cursor_execute", wait_less)
        database.rollback()
        database.close()


def test_another_machine_may_name_a_models_first_champion_just_before(finished_run):
    run = finished_run(strategies=["tsw"])
    store, named = run.layout.results / "mlflow.db", []

    def another_is_first(connection, cursor, statement, parameters, context, many):
        if statement.startswith("INSERT INTO registered_model_aliases") and not named:
            named.append(parameters)
            with contextlib.closing(sqlite3.connect(store)) as database, database:
                database.execute(statement, (*parameters[:-1], 7))

    event.listen(Engine, "before_cursor_execute", another_is_first)
    try:
        record = register_cell(run.config, *CELL)
    finally:
        event.remove(Engine, "before_cursor_execute", another_is_first)
    uri = run.layout.store
    champion = MlflowClient(uri, uri).get_model_version_by_alias(record["name"], "champion")
    assert named and champion.run_id == record["run_id"]


def test_an_unreachable_store_is_named(finished_run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = finished_run(register={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(StageError, match=r"http://127\.0\.0\.1:9 can't be used"):
        register_cell(run.config, *CELL)


def test_an_adapter_is_not_waited_for_where_no_registry_answers(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")  # by which mlflow would try for a quarter of an hour
    with pytest.raises(AdapterFormatError, match="no MLflow server answers at http://127.0.0.1:9; start it"):
        locate("models:/deltamem-tiny-random@champion", "http://127.0.0.1:9")


def test_a_missing_evaluation_is_named(finished_run):
    run = finished_run()
    run.layout.evaluation(*CELL, "qasper").unlink()
    with pytest.raises(StageError, match="pipelines.evaluate"):
        register_cell(run.config, *CELL)


def test_a_metric_that_was_not_measured_is_named(finished_run):
    run = finished_run(register={"champion_metric": "qasper/memory_effect_bleu"}, strategies=["tsw"])
    told = r"its evaluations have no 'qasper/memory_effect_bleu'; they have .*memory_effect_nll"
    record = register_cell(run.config, *CELL)
    assert re.match(told, record["no_champion"])
    with pytest.raises(StageError, match=f"no adapter of tiny-random can be champion .tsw, seed 42: {told}"):
        choose_champion(run.config, "tiny-random")


def test_a_lora_is_registered_and_only_champion_by_a_metric_it_has(finished_run):
    run = finished_run(strategies=["tsw", "context2lora"])
    lora = ("tiny-random", "context2lora", 42)
    for cell in (lora, CELL):
        register_cell(run.config, *cell)
    record = json.loads(run.layout.registration(*lora).read_text())
    assert record["no_champion"] == (
        "its evaluations have no 'qasper/memory_effect_nll'; "
        "they have qasper/full/f1, qasper/full/nll, qasper/none/f1, qasper/none/nll"
    )
    assert choose_champion(run.config, "tiny-random")["strategy"] == "tsw"

    uri = run.layout.store
    client = MlflowClient(uri, uri)
    version = client.get_model_version("deltamem-tiny-random-context2lora", record["version"])
    assert "without a pyfunc loader" in version.description and not version.aliases
    logged = client.get_run(version.run_id).data
    assert (logged.params["adapter.kind"], logged.params["adapter.rank"]) == ("lora", "8")
    assert logged.params["adapter.context"] == "True" and logged.metrics["qasper/full/nll"] == 3.0
    assert len(client.get_metric_history(version.run_id, "curve/loss")) == 5
    folder = Path(mlflow.artifacts.download_artifacts(version.source, tracking_uri=uri))
    assert sorted(path.name for path in folder.iterdir()) == sorted(ADAPTER_FILES)
    load_lora(load_backbone(run.layout.backbone("tiny-random"))[0], folder)

    changes = {"champion_metric": "qasper/full/nll", "higher_is_better": False}
    other = run.config.model_copy(update={"registry": run.config.registry.model_copy(update=changes)})
    run.evaluate(*CELL, effect=1.0, conditions=("none", "state", "swapped"))
    for cell in (lora, CELL):
        register_cell(other, *cell)
    assert choose_champion(other, "tiny-random")["strategy"] == "context2lora"
