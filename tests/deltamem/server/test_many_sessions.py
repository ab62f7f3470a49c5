"""A hundred sessions at once: each sees its own memory only, and nothing told to a client is ever lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from deltamem import ChatSession
from deltamem.cli.loading import load
from deltamem.errors import DeltaMemError
from deltamem.server.metrics import Metrics
from deltamem.server.store import SessionStore, StoreLimits
from tests.deltamem.server.patient import http
from tests.tiny_models import make_chat_model

SESSIONS = 100


def secret(number):
    return f"secret-{number * 7919 % 10007:05d}"


def connect(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=None)


def say(client, number, text, **fields):
    options = {"model": "tiny", "max_tokens": 4, "temperature": 0, "extra_body": {"session_id": f"s{number}"}}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **{**options, **fields})


def check_own_memory(runtime, state, number, turns):
    """The state's tokens are this session's, and its memory and cache are what these tokens alone make."""
    text = runtime.tokenizer.decode(state.tokens)
    assert set(re.findall(r"secret-\d+", text)) == {secret(number)}
    assert [m["role"] for m in state.messages] == ["user", "assistant"] * turns
    with torch.no_grad():
        alone = runtime.model(torch.tensor([state.tokens]), use_cache=True)
    torch.testing.assert_close(dict(state.memory.states), dict(alone.memory.states), rtol=1e-4, atol=1e-5)
    for (keys, values), layer in zip(state.keys.layers, alone.past_key_values.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, layer.values, rtol=1e-4, atol=1e-4)


LOST = (openai.APIConnectionError, httpx.TransportError)
"""What a client hears of a server that is gone."""


def turns_until_killed(client, numbers, together, kill, lost=LOST):
    """Streams turns of new sessions and kills their server amid them: how many of each a client saw the end of."""
    told = {number: 0 for number in numbers}

    def talk(number):
        """One streamed turn, which counts once its last chunk is there."""
        try:
            text = f"my word is {secret(number)}, turn {told[number]}"
            for chunk in say(client, number, text, stream=True):
                if chunk.choices[0].finish_reason:
                    told[number] += 1
        except lost:
            pass

    with ThreadPoolExecutor(together) as pool:
        talks = [pool.submit(talk, number) for _ in range(10) for number in told]
        while sum(told.values()) < 1.5 * len(told):
            time.sleep(0.02)
        kill()
        for done in talks:
            done.result()
    return told


def test_interleaved_sessions_never_see_each_other(start_server):
    """Sessions also leave the main memory all the time: it holds about ten of them."""
    server = start_server(kept=StoreLimits(memory_bytes=10 * 50_000), most_together=16)
    client = connect(server.url)
    turns = [f"my word is {{}}, turn {turn}" for turn in range(2)]
    with ThreadPoolExecutor(24) as pool:
        for turn in turns:
            replies = list(pool.map(lambda n, t=turn: say(client, n, t.format(secret(n))), range(SESSIONS)))
    held = len(server.chat.store._held)
    assert 0 < held < SESSIONS / 2
    for number in range(SESSIONS):
        state = server.chat.store.get(f"s{number}")
        check_own_memory(server.runtime, state, number, turns=2)
        assert state.messages[-1]["content"] == replies[number].choices[0].message.content
    for number in range(0, SESSIONS, 20):  # and each said what it would have said alone
        alone = ChatSession(server.runtime.model, server.runtime.tokenizer)
        for turn in turns:
            alone.send(turn.format(secret(number)), max_new_tokens=4)
        assert alone.messages == list(server.chat.store.get(f"s{number}").messages)


def test_one_sessions_requests_take_turns(start_server):
    server = start_server()
    client = connect(server.url)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: say(client, 0, f"{secret(0)} {n}"), range(8)))
    check_own_memory(server.runtime, server.chat.store.get("s0"), 0, turns=8)
    cached = sorted(reply.usage.prompt_tokens_details.cached_tokens for reply in replies)
    totals = sorted(reply.usage.total_tokens for reply in replies)
    assert cached == [0, *totals[:-1]]


@pytest.fixture
def saved_model(tmp_path):
    """Folders of a backbone with its tokenizer, and of an adapter."""
    model, tokenizer = make_chat_model()
    model.base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "base", tmp_path / "tiny"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start_process(saved_model, store, port):
    base, adapter = saved_model
    command = [sys.executable, "-c", "from deltamem.cli import main; main()", "serve"]
    command += ["--base", str(base), "--adapter", str(adapter), "--store", str(store), "--port", str(port)]
    command += ["--batch-size", "16", "--device", "cpu"]
    environment = {**os.environ, "DELTAMEM_API_KEY": "sk-crash", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)


def test_nothing_acknowledged_is_lost_by_kill_9(saved_model, start_server, tmp_path):
    port, store = free_port(), tmp_path / "sessions"
    url = f"http://127.0.0.1:{port}"
    process = start_process(saved_model, store, port)
    client = connect(url, "sk-crash")
    told = turns_until_killed(client, range(SESSIONS), 24, lambda: process.send_signal(signal.SIGKILL))
    assert process.wait() == -signal.SIGKILL
    assert min(told.values()) >= 1

    model = load(str(saved_model[0]), str(saved_model[1]), None, "cpu", "auto")
    again = start_server(store=store, model=model)
    with pytest.raises(DeltaMemError, match="another server"):
        SessionStore({"tiny": again.runtime}, store, StoreLimits(), Metrics())
    for number in range(SESSIONS):
        state = again.chat.store.get(f"s{number}")
        turns = len(state.messages) // 2
        # a turn may have been kept whose end the client never heard of
        assert told[number] <= turns <= told[number] + 1
        check_own_memory(again.runtime, state, number, turns)
    reply = say(connect(again.url), 0, f"{secret(0)} again")
    assert reply.usage.prompt_tokens_details.cached_tokens > 0


def test_a_server_with_another_adapter_refuses_the_session_and_says_why(start_server):
    first = start_server()
    assert first.ask("hi", session="s").status_code == 200
    first.stop()
    other = start_server(model=make_chat_model(seed=5))
    answer = other.ask("hi", session="s")
    assert answer.status_code == 422 and "another adapter" in answer.json()["error"]["message"]
    assert other.ask("hi", session="t").status_code == 200


def test_unused_sessions_are_removed_for_their_age(start_server):
    server = start_server(kept=StoreLimits(age_seconds=100))
    for name in ("old", "new"):
        server.ask("hi", session=name)
    store = server.chat.store
    for manifest in store.root.glob("*/session.json"):
        if json.loads(manifest.read_text())["settings"]["session_id"] == "old":
            os.utime(manifest, (1, 1))
    server.stop()
    again = start_server(kept=StoreLimits(age_seconds=100))
    assert again.chat.store.get("old") is None and again.chat.store.get("new") is not None
    assert len(list(again.chat.store.root.glob("*/session.json"))) == 1
