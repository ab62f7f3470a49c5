"""A long prompt does not hold up the others, and can be called off before it is read to its end."""

import gc
import socket
import threading
import time
import weakref

import httpx
import pytest

from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.turn import Turn, TurnOptions
from deltamem.server.metrics import Metrics
from deltamem.server.scheduler import Cancelled, Finished, Job, TurnScheduler
from tests.deltamem.server.patient import http
from tests.tiny_models import make_chat_model

PART = 16
LONG, SHORT = "a long message, " * 30, "short"


class Bench:
    """A scheduler whose passes and events are noted in the order in which they happen."""

    def __init__(self):
        self.runtime = ChatRuntime(*make_chat_model(), part_tokens=PART)
        self.scheduler = TurnScheduler(Metrics())
        self.events, self.ends = [], {}
        self.on_pass = lambda tokens: None
        self.runtime.model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def submit(self, name, text, tokens, commit=lambda state: state):
        turn = Turn(
            self.runtime,
            self.runtime.new_state(),
            [{"role": "user", "content": text}],
            TurnOptions(max_new_tokens=tokens),
        )
        self.ends[name] = threading.Event()
        job = Job(turn, lambda event: self._emit(name, event), commit)
        self.scheduler.submit(job)
        return job

    def wait(self, name):
        assert self.ends[name].wait()
        return next(event for who, event in self.events if who == name and not isinstance(event, str))

    def _emit(self, name, event):
        self.events.append((name, event))
        if not isinstance(event, str):
            self.ends[name].set()

    def _note(self, module, args, kwargs):
        tokens = args[0] if args else kwargs["input_ids"]
        self.events.append(("pass", tokens.shape[1]))
        self.on_pass(tokens)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.scheduler.stop()


def test_a_running_reply_goes_on_between_the_parts_of_a_long_prompt(bench):
    started = threading.Event()
    bench.on_pass = lambda tokens: tokens.shape[1] == 1 and started.set()
    bench.submit("running", SHORT, 400)
    assert started.wait()
    bench.submit("long", LONG, 4)
    assert isinstance(bench.wait("long"), Finished)
    passes = [length for who, length in bench.events if who == "pass"]
    parts = [i for i, length in enumerate(passes) if length > 1][2:]  # after the running turn's own
    assert len(parts) > 25
    assert all(passes[a:b].count(1) == 1 for a, b in zip(parts, parts[1:], strict=False)), passes
    assert not bench.ends["running"].is_set()
    heard = [who for who, _ in bench.events]
    assert heard[: heard.index("long")].count("running") > 15  # some tokens make no whole character
    bench.wait("running")


def test_a_short_prompt_does_not_wait_for_a_long_one(bench):
    ready = threading.Event()
    bench.on_pass = lambda tokens: ready.wait()
    bench.submit("long", LONG, 4)
    bench.submit("short", SHORT, 4)
    ready.set()
    assert isinstance(bench.wait("long"), Finished)
    who = [name for name, event in bench.events if isinstance(event, Finished)]
    assert who == ["short", "long"]


def test_a_turn_called_off_between_parts_is_dropped_at_once(bench):
    committed, jobs, ready = [], [], threading.Event()

    def call_off(tokens):
        ready.wait()
        if sum(who == "pass" for who, _ in bench.events) == 3:
            jobs[0].cancelled.set()

    bench.on_pass = call_off
    jobs.append(bench.submit("long", LONG, 4, commit=lambda state: committed.append(state)))
    ready.set()
    assert isinstance(bench.wait("long"), Cancelled)
    assert [event for who, event in bench.events if who == "pass"] == [PART] * 3 and not committed


def test_a_turn_called_off_while_it_is_decoded_leaves_nothing_behind(bench):
    replying = threading.Event()
    bench.on_pass = lambda tokens: tokens.shape[1] == 1 and replying.set()
    job = bench.submit("gone", SHORT, 400)
    assert replying.wait()
    turn = weakref.ref(job.turn)
    job.cancelled.set()
    assert isinstance(bench.wait("gone"), Cancelled)
    del job
    while turn() is not None:  # the scheduler's thread is still on its way to its rest
        gc.collect()
        time.sleep(0.01)
    assert turn() is None
    bench.submit("next", SHORT, 4)
    assert isinstance(bench.wait("next"), Finished)


def test_a_client_that_leaves_before_the_first_token_takes_its_turn_back(start_server):
    server = start_server(part_tokens=PART)
    server.ask("one", session="s")
    before = server.chat.store.get("s")
    reading, gone, fed = threading.Event(), threading.Event(), []

    def wait_for_the_client(module, args, kwargs):
        fed.append((args[0] if args else kwargs["input_ids"]).shape[1])
        reading.set()
        gone.wait()

    hook = server.runtime.model.base_model.register_forward_pre_hook(wait_for_the_client, with_kwargs=True)
    body = {"model": "tiny", "messages": [{"role": "user", "content": LONG}], "session_id": "s"}
    request = httpx.Request("POST", f"{server.url}/v1/chat/completions", json=body)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        assert reading.wait()
    while 'status="499"' not in http.get(f"{server.url}/metrics").text:
        time.sleep(0.01)
    gone.set()
    assert server.ask("two", session="s").status_code == 200
    hook.remove()
    assert fed[0] == PART and sum(fed) < len(LONG) / 2
    after = server.chat.store.get("s")
    assert [m["content"] for m in after.messages if m["role"] == "user"] == ["one", "two"]
    assert after.messages[:2] == before.messages
