"""Run the server until it is told to stop."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from deltamem.errors import DeltaMemError
from deltamem.server.limits import LOOPBACK

HEAD_SECONDS = 15.0
_HEADS_END = re.compile(rb"\n\r?\n")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/]+")


def make_server(app: FastAPI, host: str, port: int, head_seconds: float = HEAD_SECONDS) -> uvicorn.Server:
    """A uvicorn server for ``app``; its ``run()`` ends on SIGINT and SIGTERM, after the running replies.

    Args:
        head_seconds: how long a client that has connected may take to send its first request's head.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        limit_concurrency=1024,
        h11_max_incomplete_event_size=64 << 10,
    )
    config.load()
    config.http_protocol_class = with_deadline(config.http_protocol_class, head_seconds)
    return uvicorn.Server(config)


def with_deadline(protocol: type[asyncio.Protocol], head_seconds: float) -> type[asyncio.Protocol]:
    """The protocol, less its patience: it closes a connection over which no request's head comes in time.

    uvicorn has no setting for this, and a waiting connection counts against ``limit_concurrency``. Only what asyncio
    defines for every protocol is used.
    """

    class PromptProtocol(protocol):  # ty: ignore[unsupported-base]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._tail = b""
            self._deadline = asyncio.get_running_loop().call_later(head_seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            if not self._deadline.cancelled():
                if _HEADS_END.search(self._tail + data):
                    self._deadline.cancel()
                self._tail = (self._tail + data)[-2:]
            super().data_received(data)

        def connection_lost(self, error: Exception | None) -> None:
            self._deadline.cancel()
            super().connection_lost(error)

    return PromptProtocol


def check_reach(host: str, api_key: str | None, origins: Sequence[str] = ()) -> None:
    """Raise DeltaMemError if the server would be open to the network, or to every web page, without a key.

    So is an origin that no page can have.
    """
    if host not in LOOPBACK and not api_key:
        raise DeltaMemError(f"host {host} can be reached from other machines: set an API key, or serve on 127.0.0.1")
    if "*" in origins and not api_key:
        raise DeltaMemError("every web page could use the server: set an API key, or name the pages' origins")
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise DeltaMemError(
                f"--allow-origin {origin}: browsers name a page's origin as https://chat.example or "
                "http://localhost:3000, without a path or a slash at its end"
            )


def bind(host: str, port: int) -> socket.socket:
    """The address, taken but not yet answering. To be called before a model is loaded for minutes.

    Raises:
        DeltaMemError: it can't be had.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        told = f"can't listen on {host}, port {port}: {error.strerror}; choose another --port or --host"
        raise DeltaMemError(told) from error
    return place
