"""What a request must be before its content is looked at: from a known client, JSON, small, and not slow."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from deltamem.server.errors import ApiError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class RequestLimits:
    """How much a client may ask of the server at once.

    Attributes:
        body_bytes: longest body.
        body_seconds: longest time for a client to send it.
        reply_tokens: longest reply a client may ask for.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    reply_tokens: int = 4096


def key_check(api_key: str | None) -> Callable[[Request], None]:
    """A dependency that lets only holders of the key in.

    Without a key the server is for this machine's users: a request must name it as they do, so that a web
    page from elsewhere can't reach it through a name of its own that resolves to this machine.
    """

    expected = (api_key or "").encode()

    def with_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode("utf-8", "surrogateescape"), expected):
            raise ApiError(
                401,
                "wrong or missing API key; send it as 'Authorization: Bearer KEY'",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def from_here(request: Request) -> None:
        if request.url.hostname not in LOOPBACK:
            raise ApiError(403, "without an API key this server answers only to localhost", "forbidden_host")

    return with_key if api_key else from_here


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """The request's JSON body, undecoded.

    Raises:
        ApiError: it isn't declared as JSON (which a web page of another origin can't do unasked), is too long, or comes
            too slowly.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, sent as Content-Type: application/json", "unsupported_media_type")
    too_large = ApiError(
        413,
        f"the body is longer than {limits.body_bytes} bytes",
        "body_too_large",
        # the rest of the body is not read, so the connection can't be used again
        headers={"Connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, message, "timeout", headers={"Connection": "close"}) from None
    return bytes(body)
