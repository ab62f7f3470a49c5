"""Run the server until it is told to stop."""

from __future__ import annotations

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
