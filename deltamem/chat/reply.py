"""How a turn is to be answered, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from deltamem.errors import DeltaMemError


@dataclass(frozen=True)
class TurnOptions:
    """How to answer.

    Attributes:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        seed: of the drawing; None draws differently each time.
        stop: the reply ends before the first of these sequences.
        write: False reads the memory without changing it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    write: bool = True

    def __post_init__(self) -> None:
        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise DeltaMemError(f"max_new_tokens must be a whole number, at least 1, got {self.max_new_tokens!r}")
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise DeltaMemError(f"temperature must be a number >= 0, got {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise DeltaMemError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise DeltaMemError(f"top_k must be a whole number >= 0, got {self.top_k!r}")
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63):
            raise DeltaMemError(f"seed must be a whole number of 64 bits, got {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise DeltaMemError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")


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
