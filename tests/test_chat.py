"""A chat that remembers: told on the page, over the API or in the terminal, out of the window, asked in other words.

The adapter is the one of ``examples`` that is made for chats; the conversations are of the split that training never
draws from.
"""

import re

import pytest
from typer.testing import CliRunner

from deltamem import DeltaMemModel
from deltamem.cli import app
from deltamem.server.limits import RequestLimits
from examples import remember
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks import get_benchmark
from pipelines.benchmarks.base import Question
from pipelines.config.benchmarks import ChatRecallSettings
from pipelines.config.resolve import load_config
from pipelines.data.conversations import conversations
from tests.deltamem.server.browser import Browser, find_browser
from tests.deltamem.server.conftest import RunningServer
from tests.deltamem.server.patient import http
from tests.deltamem.server.test_page import TEXTS, change, say
from tests.paths import PROJECT

ADAPTER = PROJECT / "examples" / "smollm2-135m-instruct-chat"
WINDOW = 160
"""Tokens: room for a turn or two, so that what was told also leaves by itself."""
LONGEST_REPLY = 40
CONVERSATIONS = list(conversations(3, 15, "eval", (2, 2)))
RIGHT_AT_LEAST = 4
"""Of the six answers: the adapter's card says how often it is right of new conversations."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ADAPTER.is_dir(), reason=f"no {ADAPTER.name} in examples"),
]


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
    running = RunningServer(tmp_path_factory.mktemp("sessions"), model=model, window=WINDOW, requests=limits)
    yield running
    running.stop()


def user_turns(conversation):
    return [message["content"] for message in conversation["messages"] if message["role"] == "user"]


def assert_remembered(answers):
    """``answers``: of every conversation, in the order of its facts."""
    benchmark = get_benchmark("chat", ChatRecallSettings(kind="chat_recall", version=1))
    facts = [fact for conversation in CONVERSATIONS for fact in conversation["facts"]]
    assert len(answers) == len(facts)
    scores = [
        benchmark.score(Question("", "", [], [""], extra={"value": fact["value"]}), answer)
        for fact, answer in zip(facts, answers, strict=True)
    ]
    right, sentences = (sum(score[metric] for score in scores) for metric in ("recalled", "in_sentences"))
    assert right >= RIGHT_AT_LEAST and sentences >= RIGHT_AT_LEAST, list(zip(facts, answers, strict=True))


def test_over_the_api(server):
    answers = []
    for number, conversation in enumerate(CONVERSATIONS):
        session = {"session": f"api-{number}", "history": "new", "max_tokens": LONGEST_REPLY}
        for text in user_turns(conversation):
            server.ask(text, **session).raise_for_status()
        for fact in conversation["facts"]:
            cleared = http.delete(f"{server.url}/v1/sessions/api-{number}/prompt").json()
            assert cleared["forgotten_messages"] == len(server.chat.store.get(f"api-{number}").messages)
            reply = server.ask(fact["question"], **session).json()
            answers.append(reply["choices"][0]["message"]["content"])
    assert_remembered(answers)


@pytest.mark.skipif(find_browser() is None, reason="needs Chromium")
def test_on_the_page(server, tmp_path):
    page, answers = Browser(find_browser(), tmp_path / "profile"), []
    try:
        page.open(server.url)
        page.wait_for('document.getElementById("model")?.textContent === "tiny"')
        for number, conversation in enumerate(CONVERSATIONS):
            change(page, "session", f"page-{number}")
            page.wait_for(f"{TEXTS}.length === 0")
            for text in user_turns(conversation):
                say(page, text)
            for fact in conversation["facts"]:
                page.run('document.getElementById("clear").click()')
                page.wait_for('document.getElementById("prompt").textContent === "0"')
                say(page, fact["question"])
                answers.append(page.run(TEXTS)[-1])
    finally:
        page.close()
    assert_remembered(answers)


def test_in_the_terminal(backbone):
    lines = []
    for conversation in CONVERSATIONS:
        lines += ["/reset", *user_turns(conversation)]
        lines += [line for fact in conversation["facts"] for line in ("/clear", fact["question"])]
    command = ["chat", "--base", str(backbone), "--adapter", str(ADAPTER), "--device", "cpu"]
    command += ["--window", str(WINDOW), "--max-new-tokens", str(LONGEST_REPLY)]
    done = CliRunner().invoke(app, command, input="\n".join(lines) + "\n", env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    replies = re.findall(r"model (.*)$", done.output, re.MULTILINE)
    said = [line for line in lines if not line.startswith("/")]
    asked = {fact["question"] for conversation in CONVERSATIONS for fact in conversation["facts"]}
    assert_remembered([reply for line, reply in zip(said, replies, strict=True) if line in asked])
