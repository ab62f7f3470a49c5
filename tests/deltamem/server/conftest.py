"""A server on loopback, in a thread."""

import contextlib
import socket
import threading
import time

import pytest

from deltamem.chat.runtime import ChatRuntime
from deltamem.server.app import create_app
from deltamem.server.limits import RequestLimits
from deltamem.server.run import make_server
from deltamem.server.serving import ServerSettings
from tests.deltamem.server.patient import http
from tests.tiny_models import make_chat_model

KEY = "sk-test-ключ"  # headers carry it as UTF-8


def ask(url, text, session=None, **fields):
    """One plain request to a server; the response."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 6}
    body |= {"temperature": 0, **fields}
    if session is not None:
        body["session_id"] = session
    return http.post(f"{url}/v1/chat/completions", json=body)


class RunningServer:
    """A real uvicorn on a free port; ``chat`` is the object behind its routes."""

    def __init__(self, store, model=None, window=None, part_tokens=512, head_seconds=15.0, name="tiny", **settings):
        self.runtime = ChatRuntime(*(model or make_chat_model()), window, part_tokens)
        self.app = create_app({name: self.runtime}, ServerSettings(store, **settings))
        self.chat = self.app.state.server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = make_server(self.app, "127.0.0.1", self.port, head_seconds)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self):
        self._server.should_exit = True
        self._thread.join()

    def ask(self, text, session=None, **fields):
        return ask(self.url, text, session, **fields)


@pytest.fixture
def start_server(tmp_path):
    """Starts servers, all on one store unless told otherwise, and stops them."""
    with contextlib.ExitStack() as stack:

        def start(store=tmp_path / "sessions", **settings):
            server = RunningServer(store, **settings)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for a module's tests, small limits, no key."""
    limits = RequestLimits(body_bytes=100_000, reply_tokens=64)
    server = RunningServer(tmp_path_factory.mktemp("sessions"), requests=limits)
    yield server
    server.stop()
