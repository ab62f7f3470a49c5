"""Responses of /v1/chat/completions: OpenAI's, and beside them what a client may know about a session's memory."""

from __future__ import annotations

import time
import uuid
from typing import Any

from deltamem.chat.reply import Reply
from deltamem.chat.state import ChatState


class Completion:
    """The response objects of one request."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, reply: Reply, extra: dict[str, Any]) -> dict[str, Any]:
        """The response to a request that isn't streamed."""
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
        return self._object("chat.completion", [choice], usage=usage(reply), deltamem=extra)

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice], **more)

    def usage_chunk(self, reply: Reply) -> dict[str, Any]:
        """The last event of a stream whose client wants to know what it used."""
        return self._object("chat.completion.chunk", [], usage=usage(reply))

    def _object(self, kind: str, choices: list, **more: Any) -> dict[str, Any]:
        return {**self.head, "object": kind, "choices": choices, **more}


def usage(reply: Reply) -> dict[str, Any]:
    """What a turn took, in tokens."""
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
        "prompt_tokens": len(state.tokens),
        "forgotten_messages": state.forgotten,
        "memory_bytes": sum(tensor.nbytes for tensor in memory.states.values()),
        "memory_norms": [round(float(norms.norm()), 4) for norms in memory.norms().values()],
    }
