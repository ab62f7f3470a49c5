"""Requests of /v1/chat/completions: OpenAI's, with what is added here (docs/server.md tells every field)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deltamem.chat.messages import Message
from deltamem.chat.reply import TurnOptions
from deltamem.chat.state import ChatState
from deltamem.protocol.errors import RequestError
from deltamem.protocol.fields import meant

SESSION_ID = r"^[A-Za-z0-9._:@+-]{1,128}$"
History = Literal["whole", "new"]
# Parts of a message that carry something a text can't; other keys of a message are a client's own notes.
_NOT_TEXT = ("tool_calls", "function_call", "audio")


class ChatMessage(BaseModel):
    """One message; its content is text, whole or in parts, and null where an assistant said nothing."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | None = Field(None, validate_default=True)

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError(f"is missing or null; a message of role {info.data['role']!r} needs text")
        if not isinstance(content, list):
            return content
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"part {number} is of type {kind!r}; only parts of type 'text' can be read")
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _is_text(self) -> ChatMessage:
        for name in _NOT_TEXT:
            if (self.model_extra or {}).get(name):
                raise ValueError(f"{name} can't be read, only text")
        return self

    def plain(self) -> Message:
        """The message as chats take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class StreamOptions(BaseModel):
    """What a stream tells beside the reply."""

    include_usage: bool | None = None


def _every_token(top_k: Any) -> Any:
    return 0 if top_k == -1 else top_k  # vLLM's and llama.cpp's way to say it


class ChatRequest(BaseModel):
    """The fields that are looked at; of others see :mod:`deltamem.protocol.fields`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int | None, BeforeValidator(_every_token)] = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []
    # Not OpenAI's
    session_id: str | None = Field(None, pattern=SESSION_ID)
    history: History | None = None
    write: bool = True
    without_memory: bool = False
    strength: float | None = Field(None, ge=-10, le=10)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_meant(cls, fields: Any) -> Any:
        return meant(fields, frozenset({*cls.model_fields, "repeat_penalty"})) if isinstance(fields, dict) else fields

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stops: list[str]) -> list[str]:
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
        drawing: dict[str, Any] = {
            name: value if (said := getattr(self, name)) is None else said for name, value in sampling.items()
        }
        return TurnOptions(
            max_new_tokens=tokens,
            **drawing,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=tuple(self.stop),
            write=self.write,
            strength=self.strength,
        )


def new_messages(state: ChatState, sent: Sequence[Message], history: History | None = None) -> list[Message]:
    """Which of the messages sent are new to the session.

    Args:
        history: what a client sends: "whole", all messages since the session began, as OpenAI's clients do; "new",
            only what the session hasn't seen; None leaves it to the messages, which tell except for a client that
            sends everything and has changed the first message: that looks like a new one.

    Raises:
        RequestError: the messages contradict the session, or add nothing to it.
    """
    if sent[-1]["role"] != "user":
        raise RequestError("messages: the last one must be a new one from the user", param="messages")
    known, system = list(state.messages), list(sent[:1] if sent[0]["role"] == "system" else [])
    if not known or (history != "new" and sent[: len(known)] == known):
        return list(sent[len(known) :])
    if history == "whole" or (history is None and sent == known[: len(sent)]):
        raise _conflict("they ask for a reply again, or change what was said, instead of going on from there")
    if any(m["role"] == "assistant" for m in sent) or system != known[: len(system)]:
        raise _conflict("they are not a continuation of this session")
    return list(sent[len(system) :])


def _conflict(what: str) -> RequestError:
    return RequestError(
        f"messages: {what}. A session can't unread what it has read. Send only the new messages (history: 'new'), or "
        "the whole history as the session has it (GET /v1/sessions/ID shows it), or begin another session",
        "session_conflict",
        "messages",
    )
