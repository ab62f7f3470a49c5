"""What the routes do, over the parts that a server is made of."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any
from weakref import WeakValueDictionary

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.protocol.requests import ChatRequest, History
from deltamem.protocol.responses import Completion, session_facts
from deltamem.server.errors import ApiError
from deltamem.server.limits import RequestLimits
from deltamem.server.metrics import Metrics
from deltamem.server.running_turn import RunningTurn
from deltamem.server.scheduler import Engine, TurnScheduler
from deltamem.server.store import SessionStore, StoreLimits

SWEEP_SECONDS = 600
StartEngine = Callable[[Metrics, int, int], Engine]
"""Starts what computes the turns: with the server's metrics, most turns together, and most waiting."""


@dataclass(frozen=True)
class ServerSettings:
    """What whoever starts a server decides.

    Attributes:
        store: folder of the kept sessions.
        api_key: None lets everybody on this machine in.
        most_together: turns decoded in one pass.
        most_waiting: turns that may wait for a place; more are refused.
        history: how messages are meant where a request doesn't say (:func:`deltamem.protocol.requests.new_messages`).
        origins: of web pages elsewhere that may call the server ("https://chat.example", or "*" for any).
    """

    store: FilePath
    api_key: str | None = None
    most_together: int = 8
    most_waiting: int = 256
    history: History | None = None
    origins: tuple[str, ...] = ()
    requests: RequestLimits = field(default_factory=RequestLimits)
    kept: StoreLimits = field(default_factory=StoreLimits)


class ChatServer:
    """What the routes do.

    Args:
        runtimes: by the names that clients call the models.
    """

    def __init__(
        self,
        runtimes: Mapping[str, ChatRuntime],
        settings: ServerSettings,
        metrics: Metrics,
        start: StartEngine | None,
    ):
        self.runtimes, self.settings, self.metrics = runtimes, settings, metrics
        self.store = SessionStore(runtimes, settings.store, settings.kept, metrics)
        self.engine = (start or TurnScheduler)(metrics, settings.most_together, settings.most_waiting)
        common = {"object": "model", "created": int(time.time()), "owned_by": "deltamem"}
        self.model_cards = {name: {"id": name, **common} for name in runtimes}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def close(self) -> None:
        """End all turns, the engine and the store."""
        self.engine.stop()
        self.store.close()

    async def sweep(self) -> None:
        """Remove sessions as they grow too old, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await asyncio.to_thread(self.store.remove_expired)

    def lock(self, session_id: str) -> asyncio.Lock:
        """One turn of a session at a time; the next waits."""
        return self._locks.setdefault(session_id, asyncio.Lock())

    def check_model(self, name: str) -> None:
        """Raise ApiError if the server has no such model."""
        if name not in self.runtimes:
            message = f"there is no model {name!r} here; this server has {', '.join(map(repr, self.runtimes))}"
            raise ApiError(404, message, "model_not_found", "model")

    def check_alive(self) -> None:
        """Raise ApiError if nothing can be answered any more."""
        if not self.engine.alive:
            raise ApiError(503, "the engine has ended", "not_healthy")

    async def answer(self, request: Request, body: bytes) -> Response:
        """POST /v1/chat/completions."""
        arrived = time.perf_counter()
        asked = ChatRequest.model_validate_json(body)
        if asked.session_id is None and (header := request.headers.get("x-session-id")) is not None:
            asked = ChatRequest.model_validate({**asked.model_dump(exclude_unset=True), "session_id": header})
        self.check_model(asked.model)
        runtime = self.runtimes[asked.model]
        options = asked.options(runtime.sampling, self.settings.requests.reply_tokens)
        lock = None if asked.session_id is None else self.lock(asked.session_id)
        asked.history = asked.history or self.settings.history
        turn = RunningTurn(runtime, self.store, self.engine, asked, lock)
        await turn.start(options)
        first = await turn.next()
        self.metrics.first_token.observe(time.perf_counter() - arrived)
        if asked.stream:
            return StreamingResponse(turn.stream(first), media_type="text/event-stream")
        while isinstance(first, str):
            first = await turn.next()
        content = Completion(asked.model).whole(first.reply, turn.extra(first))
        return Response(json.dumps(content), media_type="application/json")

    def describe(self, session_id: str) -> dict[str, Any]:
        """GET /v1/sessions/ID."""
        state = self._known(session_id)
        return {
            "id": session_id,
            "object": "session",
            "model": self.store.model(session_id),
            "messages": list(state.messages),
            "disk_bytes": self.store.disk_bytes(session_id),
            **session_facts(state),
        }

    def clear(self, session_id: str) -> dict[str, Any]:
        """DELETE /v1/sessions/ID/prompt: its turns stay in the memory only. Its lock is held."""
        state = self._known(session_id).cleared()
        self.store.put(self.store.model(session_id), session_id, state)
        return self.describe(session_id)

    def _known(self, session_id: str) -> ChatState:
        state = self.store.get(session_id)
        if state is None:
            raise ApiError(404, f"there is no session {session_id!r}", "session_not_found", "session_id")
        return state
