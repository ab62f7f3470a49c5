"""Requests and responses of /v1/chat/completions: OpenAI's, and what this server adds.

Added to the request (``extra_body`` of the openai client): ``top_k``, ``session_id`` (or the header ``X-Session-Id``),
``write`` (false: answer, but don't write this turn into the memory) and ``without_memory`` (true: the frozen
backbone's answer to the same visible messages; the session doesn't change). Added to the response:
``deltamem``.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from deltamem.chat.messages import Message
from deltamem.chat.state import ChatState
from deltamem.chat.turn import Reply, TurnOptions
from deltamem.protocol.errors import RequestError

SESSION_ID = r"^[A-Za-z0-9._:@+-]{1,128}$"


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Fields a client got from a reply and sends back (all of them null) do no harm."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value and name not in ("name", "annotations"):
                raise RequestError(f"messages: {name} is not supported, only text", "unsupported", f"messages.{name}")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields this server knows; any other is an error that names it."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    session_id: str | None = Field(None, pattern=SESSION_ID)
    write: bool = True
    without_memory: bool = False
    # Accepted where they ask for nothing that isn't done
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 0 < len(stop) <= 256 for stop in stops):
            raise ValueError("at most 4 stop sequences of 1 to 256 characters each")
        return stops

    def options(
        self, sampling: Mapping[str, float], most_tokens: int, default_tokens: int = TurnOptions.max_new_tokens
    ) -> TurnOptions:
        """How to answer; ``sampling`` says how to draw where the request doesn't."""
        tokens = self.max_completion_tokens or self.max_tokens or min(default_tokens, most_tokens)
        if tokens > most_tokens:
            raise RequestError(f"max_tokens: this server allows at most {most_tokens}", "too_large", "max_tokens")
        return TurnOptions(
            max_new_tokens=tokens,
            **{name: value if (said := getattr(self, name)) is None else said for name, value in sampling.items()},
            seed=self.seed,
            stop=tuple(self.stop or ()),
            write=self.write,
        )


def new_messages(state: ChatState, sent: Sequence[Message]) -> list[Message]:
    """Which of the messages sent are new to the session.

    A client may send the whole history each time, as OpenAI's clients do, or only what is new.

    Raises:
        RequestError: the messages contradict the session, or add nothing to it.
    """
    known = list(state.messages)
    if sent[: len(known)] == known:
        new = sent[len(known) :]
    elif any(m["role"] == "assistant" for m in sent) or (sent[0]["role"] == "system" and sent[:1] != known[:1]):
        raise RequestError(
            "messages: they are not a continuation of this session. Send only the new messages, or the whole "
            "history as the session has it (GET /v1/sessions/ID shows it), or begin another session",
            "session_conflict",
            "messages",
        )
    else:
        new = sent[1:] if sent[0]["role"] == "system" else sent
    if not new or new[-1]["role"] != "user":
        raise RequestError("messages: the last one must be a new one from the user", param="messages")
    return list(new)


class Completion:
    """The response objects of one request."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, reply: Reply, extra: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
        return self._object("chat.completion", [choice], usage=usage(reply), deltamem=extra)

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice], **more)

    def usage_chunk(self, reply: Reply) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [], usage=usage(reply))

    def _object(self, kind: str, choices: list, **more: Any) -> dict[str, Any]:
        return {**self.head, "object": kind, "choices": choices, **more}


def usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.reply_tokens,
        "total_tokens": reply.prompt_tokens + reply.reply_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }


def session_facts(state: ChatState) -> dict[str, Any]:
    """What a client may know about a session's memory."""
    memory = state.memory
    return {
        "prompt_tokens": state.keys.length,
        "forgotten_messages": state.forgotten,
        "memory_bytes": sum(tensor.nbytes for tensor in memory.states.values()),
        "memory_norms": [round(float(norms.norm()), 4) for norms in memory.norms().values()],
    }
