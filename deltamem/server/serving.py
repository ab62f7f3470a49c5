"""TODO deltamem/server/serving.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any
from weakref import WeakValueDictionary

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.chat.turn import Turn, TurnOptions, frozen_turn
from deltamem.protocol.chat_completions import ChatRequest, Completion, new_messages, session_facts
from deltamem.protocol.errors import ApiError, as_api_error
from deltamem.server.engine import Cancelled, Engine, Finished, Job
from deltamem.server.limits import RequestLimits
from deltamem.server.metrics import Metrics
from deltamem.server.store import SessionStore, StoreLimits

SWEEP_SECONDS = 600


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


class RunningTurn:
    """One request's turn, from the session's lock to the last event."""

    def __init__(self, server: ChatServer, session_id: str | None):
        self.server, self.session_id = server, session_id
        self._lock = server.lock(session_id) if session_id is not None else None
        self._events: asyncio.Queue[str | Finished | BaseException] = asyncio.Queue()
        self._job: Job | None = None

    async def start(self, asked: ChatRequest, options: TurnOptions) -> None:
        """Wait until the session is free and queue the job, at whose end, good or bad, it is free again."""
        if self._lock is not None:
            await self._lock.acquire()
        try:
            turn = await asyncio.to_thread(self._make_turn, asked, options)
            loop = asyncio.get_running_loop()
            keep = self.session_id is not None and not asked.without_memory
            self._job = Job(
                turn=turn,
                emit=lambda event: _in_loop(loop, self._take, event),
                commit=self._keep if keep else lambda state: state,
            )
            self.server.engine.submit(self._job)
        except BaseException:
            self._unlock()
            raise

    async def next(self) -> str | Finished:
        """The next piece of text, or the end; an error is raised as the client should see it."""
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self._job.cancelled.set()
            raise
        if isinstance(event, BaseException):
            raise as_api_error(event) from event
        return event

    async def stream(self, event: str | Finished, asked: ChatRequest) -> AsyncIterator[str]:
        """Server-sent events. Once the first is out, an error can only be told as an event."""
        completion = Completion(asked.model)
        try:
            yield _event(completion.chunk({"role": "assistant", "content": ""}))
            while isinstance(event, str):
                yield _event(completion.chunk({"content": event}))
                event = await self.next()
            yield _event(completion.chunk({}, event.reply.finish_reason, deltamem=self.extra(event)))
            if asked.stream_options and asked.stream_options.include_usage:
                yield _event(completion.usage_chunk(event.reply))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            self._job.cancelled.set()  # the client may have gone; after the end it changes nothing

    def extra(self, finished: Finished) -> dict[str, Any]:
        facts = session_facts(finished.state)
        return {"session_id": self.session_id, "newly_forgotten": finished.reply.newly_forgotten, **facts}

    def _make_turn(self, asked: ChatRequest, options: TurnOptions) -> Turn:
        state = self._load()
        messages = new_messages(state, [message.plain() for message in asked.messages])
        make = frozen_turn if asked.without_memory else Turn
        return make(self.server.runtime, state, messages, options)

    def _load(self) -> ChatState:
        if self.session_id is None:
            return self.server.runtime.new_state()
        self.server.store.check_room(self.session_id)
        return self.server.store.get(self.session_id) or self.server.runtime.new_state()

    def _keep(self, state: ChatState) -> ChatState:
        return self.server.store.put(self.session_id, state)

    def _take(self, event: str | Finished | BaseException) -> None:
        if not isinstance(event, str):
            self._unlock()
        if not isinstance(event, Cancelled):
            self._events.put_nowait(event)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _in_loop(loop: asyncio.AbstractEventLoop, function, event) -> None:
    try:
        loop.call_soon_threadsafe(function, event)
    except RuntimeError:  # the server's loop has ended; nobody is left to be told
        pass
