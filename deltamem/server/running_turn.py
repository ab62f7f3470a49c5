"""One request's turn, from its session's lock to the last event told to its client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from deltamem.chat.open_turn import OpenTurn
from deltamem.chat.reply import TurnOptions
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.chat.turn import frozen_turn
from deltamem.protocol.errors import RequestError
from deltamem.protocol.requests import ChatRequest, new_messages
from deltamem.protocol.responses import Completion, session_facts
from deltamem.server.errors import ApiError, as_api_error
from deltamem.server.scheduler import Cancelled, Engine, Finished, Job
from deltamem.server.store import SessionStore


class RunningTurn:
    """One request's turn.

    Args:
        runtime: of the model that is asked.
        lock: the session's, which lets one turn of it happen at a time; None where the request names no session.
    """

    def __init__(
        self,
        runtime: ChatRuntime,
        store: SessionStore,
        engine: Engine,
        asked: ChatRequest,
        lock: asyncio.Lock | None,
    ):
        self.runtime, self.store, self.engine, self.asked = runtime, store, engine, asked
        self.session_id, self._lock = asked.session_id, lock
        self._events: asyncio.Queue[str | Finished | BaseException] = asyncio.Queue()
        self._called_off = threading.Event()

    async def start(self, options: TurnOptions) -> None:
        """Wait until the session is free and queue the job, at whose end, good or bad, it is free again."""
        if self._lock is not None:
            await self._lock.acquire()
        try:
            turn = await asyncio.to_thread(self._make_turn, options)
            loop = asyncio.get_running_loop()
            emit = partial(_in_loop, loop, self._take)
            kept = None if self.asked.without_memory else self.session_id
            commit = (lambda state: state) if kept is None else partial(self.store.put, self.asked.model, kept)
            self.engine.submit(Job(turn, emit, commit, self._called_off))
        except BaseException:
            self._unlock()
            raise

    async def next(self) -> str | Finished:
        """The next piece of text, or the end; an error is raised as the client should see it."""
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self._called_off.set()
            raise
        if isinstance(event, BaseException):
            raise as_api_error(event) from event
        return event

    async def stream(self, event: str | Finished) -> AsyncIterator[str]:
        """Server-sent events. Once the first is out, an error can only be told as an event."""
        completion = Completion(self.asked.model)
        try:
            yield _event(completion.chunk({"role": "assistant", "content": ""}))
            while isinstance(event, str):
                yield _event(completion.chunk({"content": event}))
                event = await self.next()
            yield _event(completion.chunk({}, event.reply.finish_reason, deltamem=self.extra(event)))
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield _event(completion.usage_chunk(event.reply))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            self._called_off.set()  # the client may have gone; after the end it changes nothing

    def extra(self, finished: Finished) -> dict[str, Any]:
        """What the response tells of the session beside the reply."""
        facts = session_facts(finished.state)
        return {"session_id": self.session_id, "newly_forgotten": finished.reply.newly_forgotten, **facts}

    def _make_turn(self, options: TurnOptions) -> OpenTurn:
        state = self._load()
        messages = new_messages(state, [message.plain() for message in self.asked.messages], self.asked.history)
        make = self.engine.turns
        if self.asked.without_memory:
            return frozen_turn(make, self.runtime, state, messages, options)
        return make(self.runtime, state, messages, options)

    def _load(self) -> ChatState:
        if self.session_id is None:
            return self.runtime.new_state()
        self.store.check_room(self.session_id)
        state = self.store.get(self.session_id)
        if state is None:
            return self.runtime.new_state()
        if (owner := self.store.model(self.session_id)) != self.asked.model:
            raise RequestError(
                f"session {self.session_id!r} is one of the model {owner!r}, and its memory says nothing to "
                f"{self.asked.model!r}: ask {owner!r}, or name another session",
                "session_unusable",
                "model",
            )
        return state

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
