"""Run the server until it is told to stop."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from deltamem.errors import DeltaMemError
from deltamem.server.limits import LOOPBACK, PromptH11


def make_server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """A uvicorn server for ``app``; its ``run()`` ends on SIGINT and SIGTERM, after the running replies."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PromptH11,
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        limit_concurrency=1024,
        h11_max_incomplete_event_size=64 << 10,
    )
    return uvicorn.Server(config)


def check_reach(host: str, api_key: str | None) -> None:
    """Raise DeltaMemError if the server would be open to the network without a key."""
    if host not in LOOPBACK and not api_key:
        raise DeltaMemError(f"host {host} can be reached from other machines: set an API key, or serve on 127.0.0.1")


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
        raise DeltaMemError(f"can't listen on {host}, port {port}: {error.strerror}; choose another --port") from error
    return place
