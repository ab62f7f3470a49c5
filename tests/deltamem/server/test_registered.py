"""Registered models: MLflow's server, this one and a chat in Python say the same."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import httpx
import mlflow
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server

from deltamem import ChatSession, DeltaMemError
from deltamem.cli import main
from deltamem.cli.loading import load
from pipelines.errors import StageError
from pipelines.registry.model_folder import write_model_folder
from tests.deltamem.server.patient import http
from tests.tiny_models import make_chat_model

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "I am Ada."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who am I?"},
]
REQUEST = {"messages": DIALOGUE, "max_tokens": 12, "temperature": 0}


class Registry:
    """A store with one registered model, ``tiny``, whose champion is the tiny chat model."""

    def __init__(self, root):
        self.uri, self.folder, self.backbone = f"sqlite:///{root / 'store.db'}", root / "model", root / "base"
        model, tokenizer = make_chat_model("ssw")
        model.base_model.save_pretrained(self.backbone)
        tokenizer.save_pretrained(self.backbone)
        (self.backbone / "backbone.json").write_text(json.dumps({"digest": "of-base"}))
        model.save_pretrained(root / "adapter")
        write_model_folder(root / "adapter", self.backbone, "of-base", self.folder)
        client = MlflowClient(self.uri, self.uri)
        client.create_registered_model("tiny")
        client.create_model_version("tiny", source=self.folder.as_uri())
        client.set_registered_model_alias("tiny", "champion", "1")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    before = mlflow.get_tracking_uri()
    registry = Registry(tmp_path_factory.mktemp("registry"))
    mlflow.set_tracking_uri(registry.uri)
    yield registry
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def pyfunc(registry):
    return mlflow.pyfunc.load_model("models:/tiny@champion")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def expected(**options):
    return ChatSession(*make_chat_model("ssw")).send(DIALOGUE, **options)


def test_messages_are_answered_with_text_and_parameters_are_heeded(pyfunc):
    assert pyfunc.predict(DIALOGUE, params={"max_new_tokens": 12}) == expected(max_new_tokens=12).text
    drawn = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    assert pyfunc.predict(DIALOGUE, params=drawn) == expected(**drawn).text != expected(max_new_tokens=12).text


def test_both_servers_complete_a_chat_alike(registry, start_server):
    """MLflow's own server in a process of its own, as `mlflow models serve` starts it."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    places = {
        "MLFLOW_TRACKING_URI": registry.uri,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    }
    process = subprocess.Popen(command, env={**os.environ, **places}, start_new_session=True)
    try:
        ours = start_server(model=load(None, None, "models:/tiny@champion", "cpu", "auto", registry.uri))
        served = http.post(f"{ours.url}/v1/chat/completions", json={"model": "tiny", **REQUEST}).json()
        while True:
            assert process.poll() is None, "MLflow's server ended"
            try:
                http.get(f"http://127.0.0.1:{port}/ping").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.1)
        invocations = f"http://127.0.0.1:{port}/invocations"
        answer = http.post(invocations, json=REQUEST).json()
        refused = http.post(invocations, json={**REQUEST, "session_id": "ada"})
    finally:
        os.killpg(process.pid, 15)
        process.wait()
    for name in ("choices", "usage", "object"):
        assert answer[name] == served[name]
    assert answer["deltamem"]["memory_norms"] == served["deltamem"]["memory_norms"]
    assert served["choices"][0]["message"]["content"] == expected(max_new_tokens=12).text
    assert refused.status_code == 400 and "use deltamem serve" in refused.json()["message"]


QUESTIONS = ["I am Ada.", "Who am I?"]


@pytest.mark.parametrize(
    "several",
    [
        QUESTIONS,
        [[{"role": "user", "content": text}] for text in QUESTIONS],
        pd.DataFrame({"question": QUESTIONS}),
        pd.DataFrame({"messages": [[{"role": "user", "content": text}] for text in QUESTIONS], "id": [1, 2]}),
    ],
    ids=["texts", "chats", "a column of texts", "a column of chats"],
)
def test_several_chats_are_answered_one_by_one(pyfunc, several):
    alone = [pyfunc.predict(text, params={"max_new_tokens": 6}) for text in QUESTIONS]
    assert pyfunc.predict(several, params={"max_new_tokens": 6}) == alone
    assert alone[0] == ChatSession(*make_chat_model("ssw")).send(QUESTIONS[0], max_new_tokens=6).text


def test_a_table_of_roles_and_contents_is_one_chat(pyfunc):
    assert pyfunc.predict(pd.DataFrame(DIALOGUE), params={"max_new_tokens": 12}) == expected(max_new_tokens=12).text


@pytest.mark.parametrize(
    "body, kind",
    [
        (json.dumps({"inputs": QUESTIONS}), "application/json"),
        (
            json.dumps({"dataframe_split": {"columns": ["q"], "data": [[text] for text in QUESTIONS]}}),
            "application/json",
        ),
        ("q\n" + "\n".join(QUESTIONS) + "\n", "text/csv"),
    ],
)
def test_texts_in_each_of_mlflows_input_formats(registry, body, kind):
    model = mlflow.pyfunc.load_model(str(registry.folder), model_config={"max_new_tokens": 6})
    answer = scoring_server.invocations(body, kind, model, None)
    assert json.loads(answer.response)["predictions"] == model.predict(QUESTIONS)


def test_the_input_example_is_one(registry, pyfunc):
    card = Model.load(str(registry.folder))
    example = card.load_input_example(str(registry.folder))
    assert pyfunc.predict(example)["choices"][0]["message"]["role"] == "assistant"
    served = card.get_serving_input(str(registry.folder))
    answer = scoring_server.invocations(served, "application/json", pyfunc, None)
    assert json.loads(answer.response)["object"] == "chat.completion"


def test_mlflows_own_input_formats_carry_messages_and_parameters(pyfunc):
    body = json.dumps({"inputs": DIALOGUE, "params": {"max_new_tokens": 12}})
    answer = scoring_server.invocations(body, "application/json", pyfunc, None)
    assert json.loads(answer.response) == {"predictions": expected(max_new_tokens=12).text}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (7, "expected a text; chat messages"),
        ([], "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "assistant", "content": "hi"}], "last one must be a new one from the user"),
        ({"prompt": "hello"}, "expected a text; chat messages"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "the table has the columns a, b; expected"),
        (pd.DataFrame(), "the table has the columns"),
        ({**REQUEST, "stream": True}, "use deltamem serve"),
        ({**REQUEST, "shell": "rm"}, "shell"),
        ({**REQUEST, "max_tokens": 10**6}, "at most 4096"),
        ([{"role": "user", "content": "x" * 5000}], "window holds 4096"),
    ],
)
def test_what_is_not_a_chat_is_refused_with_a_reason(pyfunc, wrong, message):
    with pytest.raises(MlflowException, match=message) as caught:
        pyfunc.predict(wrong)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    "address, message",
    [
        ("models:/tiny@nobody", "alias nobody not found"),
        ("models:/nothing@champion", "name=nothing not found"),
        ("models:/tiny/7", "version=7"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(registry, address, message):
    with pytest.raises(DeltaMemError, match=message) as caught:
        load(None, None, address, "cpu", "auto", registry.uri)
    assert registry.uri in str(caught.value)


def test_a_missing_store_is_named_and_not_made(registry, tmp_path, monkeypatch, capsys):
    store = tmp_path / "none.db"
    command = ["serve", "--model", "models:/tiny@champion", "--registry", f"sqlite:///{store}"]
    command += ["--port", str(free_port())]
    monkeypatch.setattr("sys.argv", ["deltamem", *command])
    with pytest.raises(SystemExit):
        main()
    mlflow.set_tracking_uri(registry.uri)
    assert f"there is no MLflow store at sqlite:///{store}" in capsys.readouterr().err and not store.exists()


def test_a_registered_folder_that_is_gone_is_named(registry, tmp_path):
    client = MlflowClient(registry.uri, registry.uri)
    shutil.copytree(registry.folder, tmp_path / "gone")
    version = client.create_model_version("tiny", source=(tmp_path / "gone").as_uri()).version
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(DeltaMemError, match="its files are no longer in"):
        load(None, None, f"models:/tiny/{version}", "cpu", "auto", registry.uri)


def test_a_backbone_that_is_gone_is_named(registry, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(registry.folder, moved)
    card = yaml.safe_load((moved / "MLmodel").read_text())
    card["flavors"]["python_function"]["config"]["backbone"] = "/no/such/backbone"
    (moved / "MLmodel").write_text(yaml.safe_dump(card))
    with pytest.raises(DeltaMemError, match="/no/such/backbone, which is not here"):
        load(None, None, str(moved), "cpu", "auto")
    with pytest.raises(StageError, match="backbone is not at /no/such/backbone"):
        mlflow.pyfunc.load_model(str(moved))
    model, _ = load(str(registry.backbone), None, str(moved), "cpu", "auto")
    assert model.config.strategy == "ssw"


WITHOUT_A_WEB_FRAMEWORK = """
import json, sys
import mlflow.pyfunc  # brings FastAPI with it, for its own server

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastapi", "starlette", "uvicorn"):
            raise ImportError(f"{name} is not for a registered model")

for name in [name for name in sys.modules if name.partition(".")[0] in ("fastapi", "starlette", "uvicorn")]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(json.loads(sys.argv[2]))["choices"]))
"""


def test_a_registered_model_answers_where_no_web_framework_can_be_imported(registry, pyfunc):
    command = [sys.executable, "-c", WITHOUT_A_WEB_FRAMEWORK, str(registry.folder), json.dumps(REQUEST)]
    places = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == pyfunc.predict(REQUEST)["choices"]
