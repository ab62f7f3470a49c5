"""Conversations in which a person tells something about themselves, and questions for it in other words.

Between small talk and ordinary requests a person tells one fact after another; the assistant acknowledges each. Every
fact has a question, phrased otherwise than it was told, and the natural sentence that answers it. Many are easily taken
for one before them: the dog's name for the cat's. What is said is drawn from ``conversations.yaml``, and of more kinds
of facts from the files in ``kinds``.

The splits share nothing that a person says: each has phrasings of its own of every kind, and a quarter of the values
(names, cities, numbers, …: those with the smallest digests) is kept for evaluation. What they share are the kinds of
facts, whom or what they are about ("my sister", "my dog") and what the assistant says. Of the kinds that no training
sees ("my blood type") they don't share that either.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple

import yaml

from deltamem.chat.messages import Message
from pipelines.data.draw import pick, shuffled
from pipelines.data.look_alikes import MADE_UP, Words, look_alike

TEXTS = Path(__file__).with_name("conversations.yaml")
KINDS = Path(__file__).with_name("kinds")
"""Files of further kinds of facts, which training alone draws from, and of those that it never sees."""
HELD_OUT = 1 / 4
"""Of the values."""
ALIKE = 0.4
"""Of the facts after the first are of a kind that is easily taken for an earlier one's."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Fact:
    """Something a person tells: of which kind, its value, and the texts about it with all names filled in."""

    kind: str
    value: str
    told: str
    reply: str
    question: str
    answer: str

    def as_dict(self) -> dict[str, str]:
        """What is asked of it: its kind, value, question and answer."""
        return {key: getattr(self, key) for key in ("kind", "value", "question", "answer")}


def conversations(
    count: int,
    seed: int,
    split: Split,
    facts: tuple[int, int] = (1, 6),
    turns_after: int = 0,
    new_values: float = 0.0,
    words: Words = MADE_UP,
    unseen: bool = False,
) -> Iterator[dict[str, Any]]:
    """Conversations of a split; the first ones don't depend on ``count``.

    Args:
        facts: how many facts one tells, from the first number to the second.
        turns_after: ordinary turns that follow on the last fact, besides those between facts.
        new_values: of the values such a share stands in no pool, but looks like one of it.
        words: to draw those values from, besides made-up ones.
        unseen: of the kinds that no training sees, instead of those that it does; of the split eval.

    Yields:
        ``{"messages": [{"role", "content"}, …], "facts": [{"kind", "value", "question", "answer", "told_in"}, …],
        "unknown": {"question", "answer"}}``: turns of a user's message and a reply each; what is asked of each fact, in
        the order they were told, and which of the messages tells it; a question for something that was not told.

    Raises:
        ValueError: unseen kinds of the split train.
    """
    if not (kinds := _kinds(split, unseen)):
        raise ValueError("no kind of fact is unseen in training")
    for number in range(count):
        rng = random.Random(f"{seed}/{split}/{number}")
        fewest, most = facts
        draw = _Draw(rng, split, kinds, new_values, words)
        told = draw.facts(pick(rng, range(fewest, most + 1)) + 1)
        unknown = told.pop()
        messages, places = _messages(rng, split, told, turns_after)
        yield {
            "messages": messages,
            "facts": [fact.as_dict() | {"told_in": place} for fact, place in zip(told, places, strict=True)],
            "unknown": {"question": unknown.question, "answer": pick(rng, _texts()["unknown"])},
        }


def ordinary_turns(split: Split) -> list[tuple[str, str]]:
    """What is said besides facts, and a reply that fits: small talk, then requests."""
    return [(said, reply) for kind in ("small_talk", "requests") for said, reply in _texts()[kind][split]]


@cache
def values(pool: str, split: Split) -> list[str]:
    """The values of a pool in a split."""
    return [value for value in _pool(pool) if _is_held_out(value) == (split == "eval")]


def _messages(
    rng: random.Random, split: Split, facts: Sequence[Fact], turns_after: int
) -> tuple[list[Message], list[int]]:
    """The messages of a conversation, and the place among them of the one that tells each fact."""
    ordinary = itertools.cycle(shuffled(rng, ordinary_turns(split)))
    turns: list[tuple[str, str]] = []
    places: list[int] = []
    waiting = list(facts)
    while waiting:
        while rng.random() < 0.3:
            turns.append(next(ordinary))
        together, waiting = (waiting[:2], waiting[2:]) if rng.random() < 0.2 else (waiting[:1], waiting[1:])
        places += [2 * len(turns)] * len(together)
        turns.append((" ".join(fact.told for fact in together), together[-1].reply))
    turns += itertools.islice(ordinary, turns_after)
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return messages, places


class _Draw(NamedTuple):
    """Draws the facts of one conversation."""

    rng: random.Random
    split: Split
    kinds: Sequence[str]
    new_values: float
    words: Words

    def facts(self, count: int) -> list[Fact]:
        """So many facts about different things, no value twice."""
        found: dict[tuple[str, ...], Fact] = {}
        while len(found) < count:
            kind = self.kind([fact.kind for fact in found.values()])
            about, fact = self.fact(kind)
            if fact.value not in {other.value for other in found.values()}:
                found.setdefault((kind, *about.values()), fact)
        return list(found.values())

    def kind(self, before: Sequence[str]) -> str:
        """Of the next fact."""
        if before and self.rng.random() < ALIKE:
            last = pick(self.rng, before)
            group = next(group for group in _texts()["alike"] if last in group)
            return pick(self.rng, [kind for kind in group if kind in self.kinds])
        return pick(self.rng, self.kinds)

    def fact(self, kind: str) -> tuple[dict[str, str], Fact]:
        """A fact of a kind, and what it is about."""
        entry = _texts()["kinds"][kind]
        about = {name: pick(self.rng, _pool(name)) for name in _names(kind)}
        filled = about | {"value": self.value(entry["pool"])}
        told = self.said(entry["tell"], "tell_frames", filled)
        question = self.question(entry, filled)
        replies = entry["reply"] if self.rng.random() < 0.5 else _texts()["replies"]
        reply, answer = (_fill(pick(self.rng, texts), filled) for texts in (replies, entry["answer"]))
        return about, Fact(kind, filled["value"], told, reply, question, answer)

    def value(self, pool: str) -> str:
        value = pick(self.rng, values(pool, self.split))
        if self.rng.random() >= self.new_values:
            return value
        while _is_held_out(value := look_alike(self.rng, value, self.words)):
            pass
        return value

    def question(self, entry: Mapping[str, Any], names: Mapping[str, str]) -> str:
        """One that is asked of this kind alone, or one of those that are asked of anything."""
        if self.rng.random() < 0.6:
            return self.said(entry["ask"], "ask_frames", names)
        topic = pick(self.rng, entry["topics"]).format_map(names)
        return _capital(pick(self.rng, _texts()["topic_frames"][self.split]).format(topic))

    def said(self, texts: Mapping[Split, Sequence[str]], frames: str, names: Mapping[str, str]) -> str:
        """One of a person's phrasings, as it is or with something before it."""
        text = pick(self.rng, texts[self.split])
        if self.rng.random() < 0.4:
            return _fill(text, names)
        frame = pick(self.rng, _texts()[frames][self.split]).removesuffix("{}")
        if frame.rstrip()[-1] in ".!?:":
            return frame + _fill(text, names)
        starts_small = not text.startswith(("I ", "I'", "{"))
        return frame + (text[0].lower() + text[1:] if starts_small else text).format_map(names)


def _fill(text: str, names: Mapping[str, str]) -> str:
    return _capital(text.format_map(names))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@cache
def _kinds(split: Split, unseen: bool) -> list[str]:
    """The kinds of facts that are told in a split; none is unseen in training's."""
    tells = {name: kind["tell"] for name, kind in _texts()["kinds"].items()}
    return [name for name, tell in tells.items() if split in tell and unseen == ("train" not in tell)]


@cache
def _names(kind: str) -> list[str]:
    """What a kind's texts name besides the value: whom or what its facts are about."""
    entry = _texts()["kinds"][kind]
    said = [text for key in ("tell", "ask") for texts in entry[key].values() for text in texts]
    texts = said + entry["reply"] + entry["answer"]
    return sorted({name for text in texts for _, name in _cut(text) if name} - {"value"})


def _is_held_out(value: str) -> bool:
    # by the value alone, so that what stands in two pools is of one split
    return hashlib.sha256(value.lower().encode()).digest()[0] < HELD_OUT * 256


@cache
def _pool(name: str) -> list[str]:
    """All values of a pool, those of the pools that it names put in."""
    found: dict[str, None] = {}
    for entry in _texts()["pools"][name]:
        parts = [[text] if pool is None else [text + value for value in _pool(pool)] for text, pool in _cut(entry)]
        found |= dict.fromkeys("".join(chosen) for chosen in itertools.product(*parts))
    return list(found)


def _cut(entry: str) -> list[tuple[str, str | None]]:
    return [(text, name) for text, name, _, _ in Formatter().parse(entry)] or [("", None)]


@cache
def _texts() -> dict[str, Any]:
    texts, *more = map(_read, (TEXTS, *sorted(KINDS.glob("*.yaml"))))
    for file in more:
        texts["kinds"] |= file["kinds"]
        texts["pools"] |= file["pools"]
        texts["alike"] += file.get("alike", [])
    return texts


def _read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)  # in C: there are many thousand texts
