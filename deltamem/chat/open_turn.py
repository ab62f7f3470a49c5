"""What a turn in progress is, whichever engine computes it: its prompt, its reply's text, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence

from deltamem.chat.messages import Message
from deltamem.chat.reply import Reply, TurnOptions
from deltamem.chat.reply_text import ReplyText
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState, checked
from deltamem.decoding.key_values import KeyValues
from deltamem.memory import DeltaMemory


class OpenTurn:
    """New messages on their way to a reply. ``before`` is not changed, so a turn that is dropped leaves no trace.

    Attributes:
        plan: what is to be fed.
        prompt_length: tokens of the whole prompt.
        cached_tokens: how many of those cost nothing.
        finish_reason: "stop" or "length" once the reply is complete.

    Raises:
        WindowError: the messages don't fit the window.
    """

    def __init__(self, runtime: ChatRuntime, before: ChatState, messages: Sequence[Message], options: TurnOptions):
        self.runtime, self.before, self.messages, self.options = runtime, before, checked(messages), options
        self.plan = runtime.prompt(before, self.messages, options.max_new_tokens)
        read = before.tokens if self.plan.rebuild is None else self.plan.rebuild
        self.prompt_length = len(read) + len(self.plan.new.input_ids)
        self.cached_tokens = before.keys.length if self.plan.rebuild is None else 0
        self.reply = ReplyText(runtime.tokenizer, options.stop)
        self.finish_reason: str | None = None
        self.next_token: int  # the one to be fed next, once there is one

    @property
    def longest(self) -> int:
        """Tokens that prompt and reply can come to."""
        return min(self.prompt_length + self.options.max_new_tokens, self.runtime.window)

    def accept(self, token: int) -> str:
        """Take the next token and return the text it adds (which may lag); may set ``finish_reason``."""
        if token in self.runtime.end_ids:
            self.finish_reason = "stop"
            return self.reply.close()
        piece = self.reply.add(token)
        self.next_token = token
        if self.reply.stopped:
            self.finish_reason = "stop"
        elif self.prompt_length + len(self.reply.kept_tokens) >= self.longest:
            self.finish_reason = "length"
        return piece + self.reply.close() if self.finish_reason else piece

    def after(self, memory: DeltaMemory, tokens: Sequence[int], keys: KeyValues) -> ChatState:
        """The chat's state after the finished turn.

        Args:
            memory, tokens, keys: those after it.
        """
        before = self.before
        return ChatState(
            memory=memory,
            messages=(*before.messages, *self.messages, {"role": "assistant", "content": self.reply.text}),
            start=self.plan.start,
            tokens=tuple(tokens),
            keys=keys,
            parts=before.parts if self.plan.rebuild is None else (),
        )

    def summary(self) -> Reply:
        """What came of the turn; it must be finished."""
        assert self.finish_reason is not None
        return Reply(
            text=self.reply.text,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens,
            reply_tokens=len(self.reply.kept_tokens),
            newly_forgotten=max(self.plan.start - max(self.before.start, len(self.before.system)), 0),
        )
