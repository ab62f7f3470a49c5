"""Hostile and clumsy clients: each is answered in OpenAI's shape, none gets through, the server lives on."""

import asyncio
import json
import socket
import threading
from types import SimpleNamespace

import pytest

from deltamem.errors import DeltaMemError
from deltamem.server.limits import RequestLimits
from deltamem.server.run import check_reach, with_deadline
from deltamem.server.store import StoreLimits
from tests.deltamem.server.patient import http

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}


def body(**changes):
    return json.dumps({**GOOD, **changes})


def says(content):
    return body(messages=[{"role": "user", "content": content}])


HOSTILE = {
    "empty": (b"", 400),
    "not-json": (b"hello", 400),
    "cut-json": (body()[:-5], 400),
    "array": (b"[]", 400),
    "bad-utf8": (says("X").encode().replace(b"X", b"\xff\xfe"), 400),
    "lone-surrogate": (says("X").replace("X", "\\ud800"), 400),
    "deep-json": (b'{"messages":' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400),
    "nan": (body().replace('"temperature": 0', '"temperature": NaN'), 400),
    "infinity": (body().replace('"temperature": 0', '"temperature": 1e999'), 400),
    "huge-body": (says("x" * 200_000), 413),
    "long-message": (says("x" * 5_000), 400),
    "no-messages": (body(messages=[]), 400),
    "null-message": (body(messages=[None]), 400),
    "unknown-role": (body(messages=[{"role": "root", "content": "x"}]), 400),
    "no-content": (body(messages=[{"role": "user"}]), 400),
    "image": (says([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400),
    "tool-call": (body(messages=[{"role": "user", "content": "x", "tool_calls": [{}]}]), 400),
    "ends-with-assistant": (body(messages=[{"role": "assistant", "content": "x"}]), 400),
    "tools": (body(tools=[{}]), 400),
    "unknown-field": (body(shell="rm"), 400),
    "several-choices": (body(n=2), 400),
    "many-tokens": (body(max_tokens=10**9), 400),
    "no-tokens": (body(max_tokens=0), 400),
    "huge-number": (body().replace('"max_tokens": 2', '"max_tokens": ' + "9" * 5_000), 400),
    "text-tokens": (body(max_tokens="many"), 400),
    "hot": (body(temperature=99), 400),
    "huge-seed": (body(seed=2**80), 400),
    "many-stops": (body(stop=["a"] * 100), 400),
    "empty-stop": (body(stop=""), 400),
    "session-path": (body(session_id="../../etc/passwd"), 400),
    "session-absolute": (body(session_id="/etc/passwd"), 400),
    "session-null-byte": (body(session_id="a\0b"), 400),
    "session-newline": (body(session_id="abc\n"), 400),
    "session-empty": (body(session_id=""), 400),
    "session-long": (body(session_id="x" * 129), 400),
    "session-number": (body(session_id=7), 400),
}


def healthy(server):
    return server.ask("still there?").status_code == 200


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_with_a_reason(server, name):
    content, status = HOSTILE[name]
    answer = http.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert healthy(server)


@pytest.mark.parametrize("session", ["..", ".", "....", "con", "a" * 128, "-rf", "lock", "A@b+c:d_e.f"])
def test_odd_but_allowed_session_ids_stay_inside_the_store(server, session):
    before = set(server.chat.store.root.parent.iterdir())
    assert server.ask("hi", session=session).status_code == 200
    assert set(server.chat.store.root.parent.iterdir()) == before
    for path in server.chat.store.root.iterdir():
        assert path.name == "lock" or (len(path.name) == 64 and set(path.name) <= set("0123456789abcdef"))


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/v1/sessions/..%2f..%2fetc%2fpasswd", {}, 404),
        ("GET", "/v1/sessions/%00", {}, 400),
        ("DELETE", "/v1/sessions/a%20b", {}, 400),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
        ("GET", "/v1/models", {"Host": "evil.example"}, 403),
        ("GET", "/v1/models", {"Host": "127.0.0.1.evil.example"}, 403),
        ("POST", "/v1/chat/completions", {"X-Session-Id": "../x", "Content-Type": "application/json"}, 400),
    ],
)
def test_hostile_requests_are_refused(server, method, path, headers, status):
    answer = http.request(method, server.url + path, headers=headers, content=body() if method == "POST" else None)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port))


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_declared_huge_body_is_refused_before_it_is_sent(server):
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert b" 413 " in client.recv(4096)


def test_an_undeclared_huge_body_is_refused_while_it_comes(server):
    with connect(server) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = b""
        try:
            for _ in range(20):
                client.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            answer = client.recv(4096)
        except OSError:  # the server may close before all is sent
            pass
        assert not answer or b" 413 " in answer
    assert healthy(server)


def test_a_slow_body_is_given_up(start_server):
    server = start_server(requests=RequestLimits(body_seconds=0.3))
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        answer = b""
        while b"did not arrive within 0.3 s" not in answer:
            piece = client.recv(4096)
            assert piece, answer
            answer += piece
    assert b" 408 " in answer
    assert http.get(f"{server.url}/health").status_code == 200


def test_a_slow_head_is_given_up(start_server):
    server = start_server(head_seconds=0.3)
    with connect(server) as client:
        client.sendall(b"GET / HT")
        assert client.recv(100) == b""


@pytest.mark.parametrize("head, closed", [(b"GET / HTTP/1.1\r\nA: b\r\n\r\n", False), (b"GET /\r\nA: b\r\n", True)])
def test_a_connection_lives_on_once_a_head_has_come_in_whatever_pieces(head, closed):
    async def connect():
        ended = asyncio.Event()
        protocol = with_deadline(asyncio.Protocol, 0)()
        protocol.connection_made(SimpleNamespace(close=ended.set))
        for byte in head:  # all before the loop gets to the deadline
            protocol.data_received(bytes([byte]))
        await asyncio.sleep(0.01)
        return ended.is_set()

    assert asyncio.run(connect()) is closed


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01", b"\0" * 500, b"GET " + b"a" * 70_000, b"{}\r\n\r\n"])
def test_what_is_not_http_is_answered_or_closed(server, junk):
    with connect(server) as client:
        client.sendall(junk)
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(4096)
        assert not answer or b" 400 " in answer
    assert healthy(server)


def test_a_client_that_leaves_takes_its_turn_back(start_server):
    server = start_server()
    server.ask("one", session="s")
    state = server.chat.store.get("s")
    long = {"stream": True, "max_tokens": 4000}
    with http.stream("POST", f"{server.url}/v1/chat/completions", json={**GOOD, **long, "session_id": "s"}) as answer:
        next(answer.iter_lines())
    # the session is free again at once, and as it was
    assert server.ask("two", session="s").status_code == 200
    messages = server.chat.store.get("s").messages
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one", "two"]
    assert messages[:2] == state.messages


def test_a_client_that_does_not_read_holds_nobody_up(server):
    request = body(stream=True, max_tokens=64, session_id="lazy").encode()
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(request) + request)
        assert server.ask("next turn of the same session", session="lazy").status_code == 200


def test_too_many_waiting_requests_are_turned_away(start_server):
    server = start_server(most_together=1, most_waiting=1)
    statuses = []
    ask = lambda: statuses.append(server.ask("hi", max_tokens=300).status_code)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and healthy(server)


def test_sessions_beyond_the_limit_are_refused_and_the_others_go_on(start_server):
    server = start_server(kept=StoreLimits(sessions=2))
    assert [server.ask("hi", session=name).status_code for name in "abc"] == [200, 200, 429]
    assert server.ask("more", session="a").status_code == 200
    assert server.ask("no session").status_code == 200
    http.delete(f"{server.url}/v1/sessions/b")
    assert server.ask("hi", session="c").status_code == 200


def test_the_network_needs_a_key():
    with pytest.raises(DeltaMemError, match="set an API key"):
        check_reach("0.0.0.0", None)
    check_reach("0.0.0.0", "key")
    check_reach("127.0.0.1", None)
