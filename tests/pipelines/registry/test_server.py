"""Registration at an MLflow server that asks for a password, and what is found there from elsewhere."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from pipelines.errors import StageError
from pipelines.registry.registration import register_cell
from tests.mlflow_server import USER, mlflow_server
from tests.pipelines.conftest import FinishedRun
from tests.ray_head import free_port

CELL = ("tiny-random", "tsw", 42)
FIND = """
import sys
from deltamem.adapters.files import load_adapter
from deltamem.adapters.locate import locate
print(load_adapter(locate(f"models:/{sys.argv[1]}@champion", sys.argv[2]))[0].strategy)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def known(monkeypatch):
    for name, value in USER.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_eight_runs_register_at_once_and_another_process_finds_their_adapters(server, known, tmp_path, tiny_backbone):
    runs = [
        FinishedRun(
            tmp_path / f"machine{number}", tiny_backbone, strategies=["tsw"], seeds=[number],
            register={"tracking_uri": server, "experiment": "shared"},
        )
        for number in range(8)
    ]  # fmt: skip
    with ThreadPoolExecutor(len(runs)) as jobs:
        records = list(jobs.map(lambda run: register_cell(run.config, "tiny-random", "tsw", run.config.seeds[0]), runs))

    client = MlflowClient(server, server)
    versions = client.search_model_versions("name = 'deltamem-tiny-random-tsw'")
    assert {version.run_id for version in versions} == {record["run_id"] for record in records}
    assert sorted(int(version.version) for version in versions) == list(range(1, 9))
    for record in records:
        run = client.get_run(record["run_id"])
        assert run.info.status == "FINISHED" and run.data.metrics["qasper/state/nll"] == 4.0
        assert [row.step for row in client.get_metric_history(record["run_id"], "curve/loss")] == [1, 2, 3, 4, 5]
        assert len(client.list_artifacts(record["run_id"], "evals")) == 2

    found = subprocess.run(
        [sys.executable, "-c", FIND, "deltamem-tiny-random-tsw", server], capture_output=True, text=True
    )
    assert found.stdout.split() == ["tsw"], found.stderr


@pytest.mark.slow
def test_a_server_that_refuses_the_password_is_named(server, finished_run):
    run = finished_run(strategies=["tsw"], register={"tracking_uri": server})
    with pytest.raises(StageError, match=f"{server} can't be used: .*authenticated. Set MLFLOW_TRACKING_USERNAME"):
        register_cell(run.config, *CELL)


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while_is_waited_for(known, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # minutes: a slow machine starts a server slowly
    folder, port = tmp_path / "server", free_port()
    folder.mkdir()
    run = finished_run(strategies=["tsw"], register={"tracking_uri": f"http://127.0.0.1:{port}"})
    with ThreadPoolExecutor(1) as job:
        began = job.submit(register_cell, run.config, *CELL)
        with mlflow_server(folder, port=port):  # takes seconds to start, in which it is away
            assert began.result()["version"] == "1"
