"""One request's turn: between asyncio, where requests live, and the engine's threads, where turns do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from deltamem.chat_runtime import ChatState
from deltamem.server.engine import Cancelled, Finished, Job
from deltamem.server.errors import ApiError, as_api_error
from deltamem.server.schemas import ChatRequest, Completion, new_messages
from deltamem.turn import Turn, TurnOptions, frozen_turn

if TYPE_CHECKING:
    from deltamem.server.app import ChatServer


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


def session_facts(state: ChatState) -> dict[str, Any]:
    """What a client may know about a session's memory."""
    memory = state.memory
    return {
        "prompt_tokens": state.keys.length,
        "forgotten_messages": state.forgotten,
        "memory_bytes": sum(tensor.nbytes for tensor in memory.states.values()),
        "memory_norms": [round(float(norms.norm()), 4) for norms in memory.norms().values()],
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _in_loop(loop: asyncio.AbstractEventLoop, function, event) -> None:
    try:
        loop.call_soon_threadsafe(function, event)
    except RuntimeError:  # the server's loop has ended; nobody is left to be told
        pass
