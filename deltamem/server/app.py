"""The server's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, Response

from deltamem.chat.runtime import ChatRuntime
from deltamem.protocol.requests import SESSION_ID
from deltamem.server import errors
from deltamem.server.limits import RequestLimits, key_check, read_body
from deltamem.server.metrics import Metrics
from deltamem.server.serving import ChatServer, ServerSettings, StartEngine

CLIENT_LEFT = 499  # what web servers log when nobody is there to be answered
SessionId = Annotated[str, Path(pattern=SESSION_ID)]
PAGE = FilePath(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; img-src data:; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


def create_app(
    runtimes: Mapping[str, ChatRuntime], settings: ServerSettings, start: StartEngine | None = None
) -> FastAPI:
    """The ASGI application. Its engine runs and its store is open from now until its shutdown.

    Args:
        runtimes: by the names that clients call the models; this library's own engine decodes one model's turns.
        start: starts the engine; None: this library's own.
    """
    metrics = Metrics()
    server = ChatServer(runtimes, settings, metrics, start)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        sweep = asyncio.create_task(server.sweep())
        yield
        sweep.cancel()
        await asyncio.to_thread(server.close)

    app = FastAPI(title="deltamem", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_middleware(CountRequests, metrics=metrics)
    if settings.origins:
        methods = ("GET", "POST", "DELETE")
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=methods, allow_headers=("*",))
    errors.install(app)
    guarded = [Depends(key_check(settings.api_key))]

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat_completions(request: Request) -> Response:
        return await unless_client_leaves(request, server.answer, settings.requests)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(server.model_cards.values())}

    @app.get("/v1/models/{model:path}", dependencies=guarded)
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return server.model_cards[model]

    @app.get("/v1/sessions/{session_id}", dependencies=guarded)
    async def session(session_id: SessionId) -> dict[str, Any]:
        return await asyncio.to_thread(server.describe, session_id)

    @app.delete("/v1/sessions/{session_id}", dependencies=guarded)
    async def delete_session(session_id: SessionId) -> dict[str, Any]:
        async with server.lock(session_id):
            deleted = await asyncio.to_thread(server.store.delete, session_id)
        return {"id": session_id, "deleted": deleted}

    @app.delete("/v1/sessions/{session_id}/prompt", dependencies=guarded)
    async def clear_session(session_id: SessionId) -> dict[str, Any]:
        async with server.lock(session_id):
            return await asyncio.to_thread(server.clear, session_id)

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


async def unless_client_leaves(
    request: Request, answer: Callable[[Request, bytes], Coroutine[Any, Any, Response]], limits: RequestLimits
) -> Response:
    """Answer a request's body; when the client goes first, the work for it ends."""
    work = asyncio.create_task(answer(request, await read_body(request, limits)))
    # after the body, nothing but the client's leaving can be received
    left = asyncio.ensure_future(request.receive())
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
