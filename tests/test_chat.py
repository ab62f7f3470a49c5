"""A chat that remembers: told on the page, over the API or in the terminal, out of the window, asked in other words."""

import re

import pytest
from typer.testing import CliRunner

from deltamem import DeltaMemModel
from deltamem.cli import app
from deltamem.server.limits import RequestLimits
from examples import remember
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks.chat_recall import is_sentence
from pipelines.config.resolve import load_config
from tests.deltamem.server.browser import Browser, find_browser
from tests.deltamem.server.conftest import RunningServer
from tests.deltamem.server.patient import http
from tests.deltamem.server.test_page import TEXTS, change, say
from tests.paths import PROJECT

ADAPTER = PROJECT / "examples" / "smollm2-135m-instruct-text"
"""The one for chats; its card says how often it is right of conversations that it was never trained on."""
TOLD = "My name is Ada and I live in Lisbon."
ASKED = {"What is my name?": "Ada", "Where do I live?": "Lisbon"}
LONGEST_REPLY = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / remember.BACKBONE
    spec = load_config(PROJECT / "configs" / "quickstart.yaml").entry("backbones", remember.BACKBONE)
    prepare_backbone(remember.BACKBONE, spec, folder)
    return folder


@pytest.fixture(scope="module")
def server(backbone, tmp_path_factory):
    base, tokenizer = load_backbone(backbone)
    model = DeltaMemModel.from_pretrained(base, str(ADAPTER)), tokenizer
    limits = RequestLimits(reply_tokens=LONGEST_REPLY)
    running = RunningServer(tmp_path_factory.mktemp("sessions"), model=model, requests=limits)
    yield running
    running.stop()


def assert_remembered(answers):
    for answer, value in zip(answers, ASKED.values(), strict=True):
        assert re.search(rf"\b{value}\b", answer) and is_sentence(answer), answers


def test_over_the_api(server):
    def ask(text):
        reply = server.ask(text, "api", history="new", max_tokens=LONGEST_REPLY).json()
        return reply["choices"][0]["message"]["content"]

    ask(TOLD)
    answers = []
    for question in ASKED:
        cleared = http.delete(f"{server.url}/v1/sessions/api/prompt").json()
        assert cleared["forgotten_messages"] == len(server.chat.store.get("api").messages) > 0
        answers.append(ask(question))
    assert_remembered(answers)


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_on_the_page(server, tmp_path):
    page, answers = Browser(find_browser(), tmp_path / "profile"), []
    try:
        page.open(server.url)
        page.wait_for('document.getElementById("model")?.textContent === "tiny"')
        change(page, "session", "page")
        say(page, TOLD)
        for question in ASKED:
            page.run('document.getElementById("clear").click()')
            page.wait_for('document.getElementById("prompt").textContent === "0"')
            say(page, question)
            answers.append(page.run(TEXTS)[-1])
    finally:
        page.close()
    assert_remembered(answers)


def test_in_the_terminal(backbone):
    lines = [TOLD, *(line for question in ASKED for line in ("/clear", question))]
    command = ["chat", "--base", str(backbone), "--adapter", str(ADAPTER), "--device", "cpu"]
    command += ["--max-new-tokens", str(LONGEST_REPLY)]
    done = CliRunner().invoke(app, command, input="\n".join(lines) + "\n", env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert done.output.count("messages are in the memory only") == len(ASKED)
    assert_remembered(re.findall(r"model (.*)$", done.output, re.MULTILINE)[1:])
