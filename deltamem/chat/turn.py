"""One turn of a chat in progress, and turns decoded together.

What is written, and when (paper, Method, write strategies):

- tsw and msw write every token as it passes, the template's tokens too, the reply's tokens as they are fed
  back.
- ssw writes each finished message as one segment. The new messages are one pass: it reads the memory as it
  was and writes each of them. The reply is decoded without writing; once it is complete, its tokens pass a
  second time, in one go, over the cache cut back to the prompt, and are written as one segment (one per
  sentence, if the adapter says so). The second pass costs one prefill of the reply and computes what a single
  pass over the reply would.
- With ``write=False`` nothing is written.

A finished reply is wholly in the cache and in the memory (except for its end token, which the next turn's
prompt brings along), so nothing is pending between turns. Long prompts are fed in parts, where that changes
nothing: see :mod:`deltamem.chat.prompt_parts`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from deltamem.chat.format import sentence_spans
from deltamem.chat.messages import Message
from deltamem.chat.open_turn import OpenTurn
from deltamem.chat.prompt_parts import Part, cut
from deltamem.chat.reply import TurnOptions
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.sampling import Sampler
from deltamem.chat.state import ChatState
from deltamem.decoding.key_values import KeyValues
from deltamem.errors import WindowError

T = TypeVar("T", bound=OpenTurn)


class Turn(OpenTurn):
    """A turn that this library computes.

    Call :meth:`prefill` (or :meth:`feed_prompt` until it returns logits), then decode in a
    :class:`deltamem.chat.batch.Batch` and have that release the turn, then :meth:`finish`.
    """

    def __init__(self, runtime: ChatRuntime, before: ChatState, messages: Sequence[Message], options: TurnOptions):
        super().__init__(runtime, before, messages, options)
        self.by_segment = runtime.model.config.strategy == "ssw"
        self.writes_tokens = options.write and not self.by_segment
        self.keys, self.memory, self.tokens = before.keys, before.memory, list(before.tokens)
        new = self.plan.new
        self._parts = deque(self._cut(new.input_ids, new.segment_ids, options.write))
        if self.plan.rebuild is not None:
            self.keys, self.tokens = KeyValues(), []
            self._parts.extendleft(reversed(self._cut(self.plan.rebuild, None, write=False)))
        self._cache: DynamicCache | None = None
        self.sampler = Sampler(options, runtime.vocabulary, runtime.model.device)

    def feed_prompt(self) -> Tensor | None:
        """Feed the prompt's next part; after the last one, the logits [1, V] of the reply's first token."""
        if self._cache is None:
            self._cache = self.keys.to_cache()
        logits = self._feed(self._parts.popleft(), self._cache)
        if self._parts:
            return None
        self.keys, self._cache = KeyValues.from_cache(self._cache), None
        self.prompt_memory = self.memory
        return logits

    def prefill(self) -> Tensor:
        """Feed the whole prompt; returns the logits [1, V] of the reply's first token."""
        while (logits := self.feed_prompt()) is None:
            pass
        return logits

    def finish(self) -> ChatState:
        """Complete cache and memory; the chat's state after the turn."""
        kept = self.reply.kept_tokens
        fed = self.keys.length - self.prompt_length
        if (self.by_segment and self.options.write) or len(kept) < fed:
            self.keys, self.memory = self.keys.cut(0, self.prompt_length), self.prompt_memory
            del self.tokens[self.prompt_length :]
            fed = 0
        if fed < len(kept):
            segments = self._reply_segments() if self.by_segment else None
            cache = self.keys.to_cache()
            for part in self._cut(kept[fed:], segments, self.options.write):
                self._feed(part, cache)
            self.keys = KeyValues.from_cache(cache)
        return self.after(self.memory, self.tokens, self.keys)

    def _cut(self, ids: Sequence[int], segments: Sequence[int] | None, write: bool) -> list[Part]:
        return cut(ids, segments, write, self.by_segment, self.runtime.part_tokens)

    def _feed(self, part: Part, cache: DynamicCache) -> Tensor:
        device = self.runtime.model.device
        out = self.runtime.model(
            torch.tensor([part.ids], device=device),
            memory=self.memory,
            write=part.write,
            segment_ids=None if part.segments is None else torch.tensor([part.segments], device=device),
            strength=self.options.strength,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.memory = out.memory
        self.tokens += part.ids
        return out.logits[:, -1]

    def _reply_segments(self) -> list[int]:
        spans = self.reply.spans()
        if self.runtime.model.config.segment == "message":
            return [0] * len(spans)
        rule = self.runtime.model.config.segment_rule
        ends = [end for _, end in sentence_spans(self.reply.text, rule)]
        return [sum(end <= start for end in ends) for start, _ in spans]


def frozen_turn(
    make: type[T], runtime: ChatRuntime, state: ChatState, messages: Sequence[Message], options: TurnOptions
) -> T:
    """The same question to the frozen backbone, as a turn of a kind: visible messages, an empty memory, no writes.

    An empty memory reads zero, so this is the backbone's own answer, exactly. Earlier turns that don't fit
    the window are left out, the oldest first.
    """
    options, history = replace(options, write=False), state.visible[len(state.system) :]
    reserve = min(options.max_new_tokens, max(1, runtime.window // 4))
    for start in (i for i, message in enumerate(history) if message["role"] == "user"):
        shown = [*state.system, *history[start:], *messages]
        try:
            turn = make(runtime, runtime.new_state(), shown, options)
        except WindowError:
            continue
        if len(turn.plan.new.input_ids) + reserve <= runtime.window:
            return turn
    return make(runtime, runtime.new_state(), [*state.system, *messages], options)


def choose(turns: Sequence[Turn], logits: Tensor) -> list[int]:
    """The next token of each turn, greedily or drawn as its options say; logits are [B, V]."""
    tokens = logits.argmax(-1).tolist()
    for row, turn in enumerate(turns):
        if not turn.sampler.takes_the_likeliest:
            tokens[row] = turn.sampler.choose(logits[row : row + 1], turn.tokens, turn.prompt_length)
    return tokens
