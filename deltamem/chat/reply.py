"""How a turn is to be answered, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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
        min_p: draw from the tokens that have at least this share of the likeliest one's probability.
        typical_p: draw from the most typical tokens that together have this probability (locally typical sampling).
        repetition_penalty: divides the positive scores of tokens that occurred already, multiplies their negative ones.
        presence_penalty: taken off the scores of tokens that occur in the reply.
        frequency_penalty: taken off for each time that they do.
        logit_bias: {token id: what is added to its score}.
        strength: how strongly the memory steers: 1 as trained, 0 the frozen model; None: the model's own.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    write: bool = True
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    strength: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0, None), ("min_p", 0, 1)):
            _check_number(name, getattr(self, name), low, high)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), None, None)
        if self.strength is not None:
            _check_number("strength", self.strength, None, None)
        for name, high in (("top_p", 1), ("typical_p", 1), ("repetition_penalty", None)):
            _check_number(name, getattr(self, name), 0, high, open_below=True)
        for name, low in (("max_new_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise DeltaMemError(f"{name} must be a whole number, at least {low}, got {value!r}")
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**63):
            raise DeltaMemError(f"seed must be a whole number of 64 bits, got {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise DeltaMemError(f"stop must be a list of texts, none of them empty, got {self.stop!r}")


def _check_number(name: str, value: object, low: float | None, high: float | None, open_below: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    above = number and (low is None or value > low or (value == low and not open_below))
    if not above or (high is not None and value > high):
        least = "" if low is None else f" {'>' if open_below else '>='} {low}"
        most = "" if high is None else f", at most {high}"
        raise DeltaMemError(f"{name} must be a number{least}{most}, got {value!r}")


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
