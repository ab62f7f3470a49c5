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
prompt brings along), so nothing is pending between turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from deltamem.chat_format import Message, sentence_spans
from deltamem.chat_runtime import ChatRuntime, ChatState
from deltamem.errors import DeltaMemError, WindowError
from deltamem.key_values import KeyValues
from deltamem.memory import DeltaMemory
from deltamem.reply_text import ReplyText


@dataclass(frozen=True)
class TurnOptions:
    """How to answer.

    Attributes:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the drawing; None draws differently each time.
        stop: the reply ends before the first of these sequences.
        write: False reads the memory without changing it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    write: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DeltaMemError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise DeltaMemError(f"temperature must be a number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise DeltaMemError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Reply:
    """A finished reply.

    Attributes:
        text: what was said.
        finish_reason: "stop" (the model ended it, or a stop sequence did) or "length".
        prompt_tokens: length of the prompt it answers.
        cached_tokens: how many of those were in the cache already and cost nothing.
        reply_tokens: its length.
        newly_forgotten: messages that left the prompt with this turn and now are in the memory only.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    newly_forgotten: int


class Turn:
    """New messages on their way to a reply. Call :meth:`prefill`, then decode in a :class:`Batch`, then
    :meth:`finish`; ``before`` is not changed, so a turn that is dropped leaves no trace."""

    def __init__(self, runtime: ChatRuntime, before: ChatState, messages: Sequence[Message], options: TurnOptions):
        self.runtime, self.before, self.messages, self.options = runtime, before, tuple(messages), options
        self.plan = runtime.prompt(before, self.messages, options.max_new_tokens)
        self.by_segment = runtime.model.config.strategy == "ssw"
        self.writes_tokens = options.write and not self.by_segment
        self.keys, self.memory, self.tokens = before.keys, before.memory, list(before.tokens)
        self.reply = ReplyText(runtime.tokenizer, options.stop)
        self.finish_reason: str | None = None
        self.next_token: int | None = None
        self.generator: torch.Generator | None = None
        if options.temperature > 0:
            self.generator = torch.Generator(runtime.model.device)
            self.generator.manual_seed(options.seed) if options.seed is not None else self.generator.seed()

    def prefill(self) -> Tensor:
        """Feed the prompt; returns the logits [1, V] of the reply's first token."""
        if self.plan.rebuild is not None:
            self.keys, self.tokens = KeyValues(), []
            if self.plan.rebuild:
                self._feed(self.plan.rebuild, None, write=False)
        new = self.plan.new
        logits = self._feed(new.input_ids, new.segment_ids, self.options.write)
        self.prompt_length, self.prompt_memory = self.keys.length, self.memory
        return logits

    def accept(self, token: int) -> str:
        """Take the next token and return the text it adds (which may lag); may set ``finish_reason``."""
        if token in self.runtime.end_ids:
            self.finish_reason = "stop"
            return self.reply.close()
        piece = self.reply.add(token)
        self.next_token = token
        room = self.runtime.window - self.prompt_length
        if self.reply.stopped:
            self.finish_reason = "stop"
        elif len(self.reply.kept_tokens) >= min(self.options.max_new_tokens, room):
            self.finish_reason = "length"
        return piece + self.reply.close() if self.finish_reason else piece

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
            self._feed(kept[fed:], segments, self.options.write)
        before = self.before
        return replace(
            before,
            memory=self.memory,
            messages=(*before.messages, *self.messages, {"role": "assistant", "content": self.reply.text}),
            start=self.plan.start,
            tokens=tuple(self.tokens),
            keys=self.keys,
            parts=before.parts if self.plan.rebuild is None else (),
        )

    def summary(self) -> Reply:
        rebuilt = self.plan.rebuild is not None
        return Reply(
            text=self.reply.text,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_length,
            cached_tokens=0 if rebuilt else self.before.keys.length,
            reply_tokens=len(self.reply.kept_tokens),
            newly_forgotten=max(self.plan.start - max(self.before.start, len(self.before.system)), 0),
        )

    def _feed(self, ids: Sequence[int], segments: Sequence[int] | None, write: bool) -> Tensor:
        device = self.runtime.model.device
        cache = self.keys.to_cache()
        out = self.runtime.model(
            torch.tensor([list(ids)], device=device),
            memory=self.memory,
            write=write,
            segment_ids=None if segments is None else torch.tensor([list(segments)], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.keys, self.memory = KeyValues.from_cache(cache), out.memory
        self.tokens += ids
        return out.logits[:, -1]

    def _reply_segments(self) -> list[int]:
        spans = self.reply.spans()
        if self.runtime.model.config.segment == "message":
            return [0] * len(spans)
        ends = [end for _, end in sentence_spans(self.reply.text)]
        return [sum(end <= start for end in ends) for start, _ in spans]


def frozen_turn(runtime: ChatRuntime, state: ChatState, messages: Sequence[Message], options: TurnOptions) -> Turn:
    """The same question to the frozen backbone: the visible messages, an empty memory, no writes.

    An empty memory reads zero, so this is the backbone's own answer, exactly. Earlier turns that don't fit
    the window are left out, the oldest first.
    """
    options, history = replace(options, write=False), state.visible[len(state.system) :]
    reserve = min(options.max_new_tokens, max(1, runtime.window // 4))
    for start in (i for i, message in enumerate(history) if message["role"] == "user"):
        shown = [*state.system, *history[start:], *messages]
        try:
            turn = Turn(runtime, runtime.new_state(), shown, options)
        except WindowError:
            continue
        if len(turn.plan.new.input_ids) + reserve <= runtime.window:
            return turn
    return Turn(runtime, runtime.new_state(), [*state.system, *messages], options)


class Batch:
    """Turns whose next tokens come out of one forward pass.

    Caches of different lengths are padded on the left; the padding mask and each row's own positions make a
    row's result what it is alone. Turns may join and leave between steps, which copies the caches of that
    batch.
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._cache, self._memory, self._padding = None, None, []

    def step(self, turns: Sequence[Turn]) -> Tensor:
        """Feed each turn's last token; returns the next logits [B, V] in the order of ``turns``."""
        if [id(turn) for turn in turns] != [id(turn) for turn in self.turns]:
            self.release()
            self._gather(turns)
        model = turns[0].runtime.model
        length = self._cache.get_seq_length()
        padding = torch.tensor(self._padding, device=model.device)
        mask = None
        if any(self._padding):
            mask = (torch.arange(length + 1, device=model.device) >= padding[:, None]).long()
        writes = [turn.writes_tokens for turn in turns]
        out = model(
            torch.tensor([[turn.next_token] for turn in turns], device=model.device),
            attention_mask=mask,
            position_ids=(length - padding)[:, None],
            memory=self._memory,
            write=any(writes),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._memory = out.memory if all(writes) or not any(writes) else _rows(writes, out.memory, self._memory)
        for turn in turns:
            turn.tokens.append(turn.next_token)
        return out.logits[:, -1]

    def release(self) -> None:
        """Hand every turn its own cache and memory."""
        if not self.turns:
            return
        keys = KeyValues.from_cache(self._cache)
        for row, turn in enumerate(self.turns):
            turn.keys = keys.row(row, self._padding[row])
            turn.memory = self._memory.select([row])
        self.turns, self._cache, self._memory = [], None, None

    def _gather(self, turns: Sequence[Turn]) -> None:
        longest = max(turn.keys.length for turn in turns)
        self._padding = [longest - turn.keys.length for turn in turns]
        self._cache = KeyValues.left_padded([turn.keys for turn in turns]).to_cache()
        self._memory = DeltaMemory.cat(turn.memory for turn in turns)
        self.turns = list(turns)


def choose(turns: Sequence[Turn], logits: Tensor) -> list[int]:
    """The next token of each turn, greedily or drawn as its options say; logits are [B, V]."""
    tokens = logits.argmax(-1).tolist()
    for row, turn in enumerate(turns):
        if turn.generator is None:
            continue
        scores = TemperatureLogitsWarper(turn.options.temperature)(None, logits[row : row + 1].float())
        if turn.options.top_p < 1:
            scores = TopPLogitsWarper(turn.options.top_p)(None, scores)
        tokens[row] = int(torch.multinomial(scores.softmax(-1), 1, generator=turn.generator))
    return tokens


def _rows(taken: Sequence[bool], new: DeltaMemory, old: DeltaMemory) -> DeltaMemory:
    choice = torch.tensor(list(taken), device=new.device)[:, None, None, None]
    return DeltaMemory({i: torch.where(choice, new.states[i], old.states[i]) for i in new.states}, new.metadata)
