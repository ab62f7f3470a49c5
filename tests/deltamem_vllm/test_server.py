"""``deltamem serve --engine vllm``, as a process of its own: what clients see is what our own engine shows them."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner

from deltamem import ChatSession
from deltamem.chat import session_files
from deltamem.chat.runtime import ChatRuntime
from deltamem.cli import app
from deltamem.cli.loading import load
from deltamem.decoding.key_values import KeyValues
from tests.deltamem.server.conftest import ask
from tests.deltamem.server.patient import http
from tests.deltamem.server.test_hostile import HOSTILE
from tests.deltamem.server.test_many_sessions import LOST, connect, free_port, say, secret, turns_until_killed
from tests.tiny_models import make_chat_model

SESSIONS = 100
BASE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
SETTINGS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 16}
# One thread that is bound to no core: where others want the cores, too, threads that wait for each other take seconds.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def hashed(session):
    """The name of a session's folder."""
    return hashlib.sha256(session.encode()).hexdigest()


def serve(folder, store, port):
    """The command's words."""
    command = [sys.executable, "-c", "from deltamem.cli import main; main()", "serve", "--engine", "vllm"]
    command += ["--base", str(folder / "base"), "--adapter", str(folder / "tiny")]
    command += ["--adapter", f"second={folder / 'msw'}", "--store", str(store)]
    return [*command, "--port", str(port), "--engine-settings", json.dumps(SETTINGS)]


class Server:
    """The command in a process of its own."""

    def __init__(self, folder, store, *options):
        port = free_port()
        self.store, self.url = store, f"http://127.0.0.1:{port}"
        self.command = [*serve(folder, store, port), *options]
        self.start()

    def start(self):
        """Begin, or begin again, and wait until it answers: three processes import vLLM, one after the other."""
        self.process = subprocess.Popen(self.command, env={**os.environ, **ENVIRONMENT}, start_new_session=True)
        while True:
            with contextlib.suppress(httpx.TransportError):
                if http.get(f"{self.url}/health").status_code == 200:
                    return
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.2)

    def stop(self):
        self.process.terminate()
        return self.process.wait()

    def kill(self):
        """Kill -9; it takes its engine's processes along, as a machine that goes down does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def ask(self, text, session=None, **fields):
        return ask(self.url, text, session, **fields)

    def place(self, session):
        return self.store / hashed(session)

    def kept(self, session, runtime):
        """A session's state, read from its files by our own code."""
        return session_files.load(runtime, self.place(session))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = make_chat_model(base=BASE)
    model.base_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "tiny")
    make_chat_model("msw", base=BASE)[0].save_pretrained(folder / "msw")
    return folder


@pytest.fixture(scope="module")
def runtime(folder):
    return ChatRuntime(*load(str(folder / "base"), str(folder / "tiny"), None, "cpu", "auto"))


def terminal(folder, *lines, session=None):
    """``deltamem chat``, told these lines."""
    command = ["chat", "--base", folder / "base", "--adapter", folder / "tiny", "--device", "cpu"]
    command += ["--max-new-tokens", 6, *(() if session is None else ("--session", session))]
    result = CliRunner().invoke(app, [str(part) for part in command], input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """One for most tests; its store holds a chat of the terminal's already, one damaged, and one that isn't its own."""
    store = tmp_path_factory.mktemp("sessions")
    terminal(folder, "said in the terminal", f"/save {store / hashed('terminal')}")
    for name in ("damaged", "other-adapter"):
        shutil.copytree(store / hashed("terminal"), store / hashed(name))
    (memory,) = (store / hashed("damaged")).glob("memory-*.safetensors")
    memory.write_bytes(memory.read_bytes()[:-40] + b"\xff" * 40)
    manifest = store / hashed("other-adapter") / "session.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "adapter_digest": "0" * 64}))
    running = Server(folder, store, "--max-reply-tokens", "64", "--max-body-mb", "0.1")
    yield running
    assert running.stop() == -signal.SIGTERM  # with which uvicorn ends itself, once all is shut down


def content(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def assert_same_memory(found, expected):
    torch.testing.assert_close(dict(found.states), dict(expected.states), rtol=1e-4, atol=1e-4)


def check_own_memory(runtime, state, number, turns):
    """The state's tokens are this session's, and its memory is what these tokens alone make."""
    assert set(re.findall(r"secret-\d+", runtime.tokenizer.decode(state.tokens))) == {secret(number)}
    assert [m["role"] for m in state.messages] == ["user", "assistant"] * turns
    with torch.no_grad():
        alone = runtime.model(torch.tensor([state.tokens]))
    assert_same_memory(state.memory, alone.memory)


def without_cache(chat):
    """The same chat as it is read from files that hold no cache."""
    chat.state = replace(chat.state, keys=KeyValues(), parts=())
    return chat


def test_turns_are_those_of_a_chat_of_our_own(server, runtime):
    chat = ChatSession(runtime.model, runtime.tokenizer)
    for turn, options in enumerate([{}, {}, {"stop": ["e", "a"]}, {"max_tokens": 40}, {}]):
        ours = {"stop": options.get("stop", ()), "max_new_tokens": options.get("max_tokens", 6)}
        answer = server.ask(f"turn {turn} of this", "own", **options)
        reply = chat.send(f"turn {turn} of this", **ours)
        assert content(answer) == reply.text
        assert answer.json()["usage"]["completion_tokens"] == reply.reply_tokens
        assert answer.json()["choices"][0]["finish_reason"] == reply.finish_reason
        state = server.kept("own", runtime)
        assert state.tokens == chat.state.tokens
        assert_same_memory(state.memory, chat.memory)


def test_each_model_answers_by_its_own_adapter_and_keeps_its_own_sessions(server, folder):
    assert [model.id for model in connect(server.url).models.list()] == ["tiny", "second"]
    second = ChatRuntime(*load(str(folder / "base"), str(folder / "msw"), None, "cpu", "auto"))
    chat = ChatSession(second.model, second.tokenizer)
    for text in ("a note to the second", "and another"):
        assert content(server.ask(text, "of-second", model="second")) == chat.send(text, max_new_tokens=6).text
    refused = server.ask("hi", "of-second").json()["error"]
    assert refused["code"] == "session_unusable" and "ask 'second'" in refused["message"]
    assert content(server.ask("go on", "of-second", model="second")) == chat.send("go on", max_new_tokens=6).text
    assert_same_memory(server.kept("of-second", second).memory, chat.memory)
    assert http.get(f"{server.url}/v1/sessions/of-second").json()["model"] == "second"
    unknown = server.ask("hi", model="third")
    assert unknown.status_code == 404 and "'tiny', 'second'" in unknown.json()["error"]["message"]


def test_a_question_that_is_not_written_leaves_the_memory_as_it_is(server, runtime):
    chat = ChatSession(runtime.model, runtime.tokenizer)
    server.ask("a note to keep", "read")
    chat.send("a note to keep", max_new_tokens=6)
    for question in ("what was it?", "and again?"):
        answer = server.ask(question, "read", write=False)
        assert content(answer) == without_cache(chat).send(question, max_new_tokens=6, write=False).text
        assert_same_memory(server.kept("read", runtime).memory, chat.memory)
    answer = server.ask("now write this", "read")
    assert content(answer) == without_cache(chat).send("now write this", max_new_tokens=6).text
    assert_same_memory(server.kept("read", runtime).memory, chat.memory)


def test_the_frozen_backbone_can_be_asked_and_the_strength_chosen(server, runtime):
    chat = ChatSession(runtime.model, runtime.tokenizer)
    server.ask("a note", "frozen")
    chat.send("a note", max_new_tokens=6)
    _, frozen = chat.compare("and you?", max_new_tokens=6)
    before = server.kept("frozen", runtime)
    assert content(server.ask("and you?", "frozen", without_memory=True)) == frozen.text
    assert server.kept("frozen", runtime).messages == before.messages
    answer = server.ask("weaker now", "frozen", strength=0.25)
    assert content(answer) == without_cache(chat).send("weaker now", max_new_tokens=6, strength=0.25).text


def test_a_cleared_prompt_stays_in_the_memory_only(server, runtime):
    chat = ChatSession(runtime.model, runtime.tokenizer)
    server.ask("something to remember", "cleared")
    chat.send("something to remember", max_new_tokens=6)
    assert http.delete(f"{server.url}/v1/sessions/cleared/prompt").status_code == 200
    chat.clear_prompt()
    assert content(server.ask("what was it?", "cleared")) == chat.send("what was it?", max_new_tokens=6).text
    assert_same_memory(server.kept("cleared", runtime).memory, chat.memory)
    told = http.get(f"{server.url}/v1/sessions/cleared").json()
    assert told["forgotten_messages"] == 2 and told["prompt_tokens"] == len(chat.state.tokens)


def test_a_chat_of_the_terminal_goes_on_here_and_is_taken_back(server, folder, runtime, tmp_path):
    chat = ChatSession(runtime.model, runtime.tokenizer)
    chat.send("said in the terminal", max_new_tokens=6)
    reply = say(connect(server.url), 0, "said to it", extra_body={"session_id": "terminal"}, max_tokens=6)
    expected = without_cache(chat).send("said to it", max_new_tokens=6)
    assert reply.choices[0].message.content == expected.text
    shutil.copytree(server.place("terminal"), tmp_path / "back")
    terminal(folder, "and here again", f"/save {tmp_path / 'after'}", session=tmp_path / "back")
    without_cache(chat).send("and here again", max_new_tokens=6)
    back = ChatSession.load(runtime.model, runtime.tokenizer, tmp_path / "after")
    assert back.messages == chat.messages
    assert_same_memory(back.memory, chat.memory)


def test_sampling_is_reproducible_by_its_seed(server):
    asked = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 5, "max_tokens": 12}
    assert content(server.ask("draw", **asked)) == content(server.ask("draw", **asked))
    refused = server.ask("draw", typical_p=0.5, temperature=1)
    assert refused.status_code == 400 and "typical_p" in refused.json()["error"]["message"]


def test_a_stream_is_the_whole_reply_in_pieces(server):
    client = connect(server.url)
    whole = say(client, "stream-1", "tell me", max_tokens=12)
    pieces = list(say(client, "stream-2", "tell me", max_tokens=12, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_client_that_leaves_ends_its_turn_and_leaves_no_trace(server, runtime):
    server.ask("before", "left")
    before = server.kept("left", runtime)
    with pytest.raises(httpx.TimeoutException):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 1500}], "max_tokens": 64}
        leaves = httpx.Timeout(60, read=0.005)  # long after it is sent, and long before 1,500 tokens are read
        httpx.post(f"{server.url}/v1/chat/completions", json={**body, "session_id": "left"}, timeout=leaves)
    reply = server.ask("after", "left")  # waits for its session to be free
    assert content(reply) is not None
    state = server.kept("left", runtime)
    assert [m["content"] for m in state.messages if m["role"] == "user"][:1] == ["before"]
    assert state.messages[: len(before.messages)] == before.messages


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_with_a_reason(server, name):
    sent, status = HOSTILE[name]
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"{server.url}/v1/chat/completions", content=sent, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("session", ["..", ".", "....", "con", "a" * 128, "-rf", "lock", "A@b+c:d_e.f"])
def test_odd_but_allowed_session_ids_stay_inside_the_store(server, session):
    before = set(server.store.parent.iterdir())
    assert server.ask("hi", session=session).status_code == 200
    assert set(server.store.parent.iterdir()) == before
    for path in server.store.iterdir():
        assert path.name == "lock" or (len(path.name) == 64 and set(path.name) <= set("0123456789abcdef"))


@pytest.mark.parametrize("field", ["kv_transfer_params", "extra_args", "vllm_xargs", "memory", "deltamem"])
def test_the_engines_own_fields_are_not_a_clients_to_set(server, field):
    answer = server.ask("hi", **{field: {"deltamem": {"memory": "AAAA", "keep": "../../x"}}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
    assert server.ask("still there?").status_code == 200


@pytest.mark.parametrize("session", ["damaged", "other adapter"])
def test_a_session_that_cannot_go_on_is_refused_and_the_others_go_on(server, session):
    answer = server.ask("hi", session.replace(" ", "-"))
    assert answer.status_code == 422 and session in answer.json()["error"]["message"].replace("another", "other")
    assert server.ask("hi").status_code == 200


def test_a_hundred_interleaved_sessions_never_see_each_other(server, runtime):
    client = connect(server.url)
    turns = [f"my word is {{}}, turn {turn}" for turn in range(2)]
    with ThreadPoolExecutor(24) as pool:
        for turn in turns:
            replies = list(pool.map(lambda n, t=turn: say(client, n, t.format(secret(n))), range(SESSIONS)))
    for number in range(SESSIONS):
        state = server.kept(f"s{number}", runtime)
        check_own_memory(runtime, state, number, turns=2)
        assert state.messages[-1]["content"] == replies[number].choices[0].message.content


def test_a_server_that_is_told_to_end_while_it_starts_leaves_no_process(folder, tmp_path):
    """All its processes have its output open, which so ends with the last of them."""
    environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"}
    command = serve(folder, tmp_path / "sessions", free_port())
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as starting:
        while "EngineCore" not in (line := starting.stdout.readline()):
            assert line, "the server ended"
        starting.terminate()
        starting.stdout.read()
    assert starting.returncode == 128 + signal.SIGTERM


def test_nothing_acknowledged_is_lost_by_kill_9(server, runtime):
    def kill():
        assert server.kill() == -signal.SIGKILL

    numbers = range(SESSIONS, SESSIONS + 20)
    told = turns_until_killed(connect(server.url), numbers, 12, kill, lost=(*LOST, openai.APIStatusError))
    server.start()
    for number, count in told.items():
        if not server.place(f"s{number}").exists():
            assert count == 0
            continue
        state = server.kept(f"s{number}", runtime)
        turns = len(state.messages) // 2
        assert count <= turns <= count + 1  # a turn may have been kept whose end the client never heard of
        check_own_memory(runtime, state, number, turns)
    again = say(connect(server.url), SESSIONS, f"{secret(SESSIONS)} again")
    assert again.choices[0].message.content is not None
