"""The server's routes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends, FastAPI, Path, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from deltamem.chat_runtime import ChatRuntime
from deltamem.server import errors
from deltamem.server.engine import Engine
from deltamem.server.errors import ApiError
from deltamem.server.limits import RequestLimits, key_check, read_body
from deltamem.server.metrics import Metrics
from deltamem.server.running_turn import RunningTurn, session_facts
from deltamem.server.schemas import SESSION_ID, ChatRequest, Completion
from deltamem.server.store import SessionStore, StoreLimits

SWEEP_SECONDS = 600
CLIENT_LEFT = 499  # what web servers log when nobody is there to be answered
SessionId = Annotated[str, Path(pattern=SESSION_ID)]
PAGE = FilePath(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; img-src data:; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


@dataclass(frozen=True)
class ServerSettings:
    """Attributes:
    model_name: what /v1/models calls the model.
    store: folder of the kept sessions.
    api_key: None lets everybody on this machine in.
    most_together: turns decoded in one pass.
    most_waiting: turns that may wait for a place; more are refused.
    """

    model_name: str
    store: FilePath
    api_key: str | None = None
    most_together: int = 8
    most_waiting: int = 256
    requests: RequestLimits = field(default_factory=RequestLimits)
    kept: StoreLimits = field(default_factory=StoreLimits)


def create_app(runtime: ChatRuntime, settings: ServerSettings) -> FastAPI:
    """The ASGI application. Its model thread runs and its store is open from now until its shutdown."""
    metrics = Metrics()
    server = ChatServer(runtime, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweep = asyncio.create_task(server.sweep())
        yield
        sweep.cancel()
        await asyncio.to_thread(server.close)

    app = FastAPI(title="deltamem", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_middleware(CountRequests, metrics=metrics)
    errors.install(app)
    guarded = [Depends(key_check(settings.api_key))]

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat_completions(request: Request) -> Response:
        return await unless_client_leaves(request, server.answer, settings.requests)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model_card]}

    @app.get("/v1/models/{model:path}", dependencies=guarded)
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return server.model_card

    @app.get("/v1/sessions/{session_id}", dependencies=guarded)
    async def session(session_id: SessionId) -> dict[str, Any]:
        return await asyncio.to_thread(server.describe, session_id)

    @app.delete("/v1/sessions/{session_id}", dependencies=guarded)
    async def delete_session(session_id: SessionId) -> dict[str, Any]:
        async with server.lock(session_id):
            deleted = await asyncio.to_thread(server.store.delete, session_id)
        return {"id": session_id, "deleted": deleted}

    @app.get("/metrics", dependencies=guarded)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> dict[str, str]:
        server.check_alive()
        return {"status": "ok"}

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})

    return app


class ChatServer:
    """What the routes do."""

    def __init__(self, runtime: ChatRuntime, settings: ServerSettings, metrics: Metrics):
        self.runtime, self.settings, self.metrics = runtime, settings, metrics
        self.store = SessionStore(runtime, settings.store, settings.kept, metrics)
        self.engine = Engine(metrics, settings.most_together, settings.most_waiting)
        self.model_card = {"id": settings.model_name, "object": "model", "created": int(time.time())}
        self.model_card["owned_by"] = "deltamem"
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        self.engine.stop()
        self.store.close()

    async def sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await asyncio.to_thread(self.store.remove_expired)

    def lock(self, session_id: str) -> asyncio.Lock:
        """One turn of a session at a time; the next waits."""
        return self._locks.setdefault(session_id, asyncio.Lock())

    def check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            message = f"there is no model {name!r} here; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def check_alive(self) -> None:
        if not self.engine.alive:
            raise ApiError(503, "the model's thread has ended", "not_healthy")

    async def answer(self, request: Request, body: bytes) -> Response:
        """POST /v1/chat/completions."""
        arrived = time.perf_counter()
        asked = ChatRequest.model_validate_json(body)
        if asked.session_id is None and (header := request.headers.get("x-session-id")) is not None:
            asked = ChatRequest.model_validate({**asked.model_dump(exclude_unset=True), "session_id": header})
        self.check_model(asked.model)
        options = asked.options(self.runtime.sampling, self.settings.requests.reply_tokens)
        turn = RunningTurn(self, asked.session_id)
        await turn.start(asked, options)
        first = await turn.next()
        self.metrics.first_token.observe(time.perf_counter() - arrived)
        if asked.stream:
            return StreamingResponse(turn.stream(first, asked), media_type="text/event-stream")
        while isinstance(first, str):
            first = await turn.next()
        content = Completion(asked.model).whole(first.reply, turn.extra(first))
        return Response(json.dumps(content), media_type="application/json")

    def describe(self, session_id: str) -> dict[str, Any]:
        """GET /v1/sessions/ID."""
        state = self.store.get(session_id)
        if state is None:
            raise ApiError(404, f"there is no session {session_id!r}", "session_not_found", "session_id")
        return {
            "id": session_id,
            "object": "session",
            "messages": list(state.messages),
            "disk_bytes": self.store.disk_bytes(session_id),
            **session_facts(state),
        }


async def unless_client_leaves(
    request: Request, answer: Callable[[Request, bytes], Awaitable[Response]], limits: RequestLimits
) -> Response:
    """Answer a request's body; when the client goes first, the work for it ends."""
    work = asyncio.create_task(answer(request, await read_body(request, limits)))
    # after the body, nothing but the client's leaving can be received
    left = asyncio.create_task(request.receive())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=CLIENT_LEFT)
    finally:
        left.cancel()
        work.cancel()


class CountRequests:
    """ASGI middleware: requests by route and status."""

    def __init__(self, app, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        async def counting(message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
