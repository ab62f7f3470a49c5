"""What a chat remembers: facts told in conversations that have left the window, asked for in other words.

The conversations are the generator's (:mod:`pipelines.data.conversations`), of the split that training never draws
from. The question is written as it is read, as chats do. Conversations with more turns after the facts are the same
ones as those with fewer, so that what the turns cost is paired.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.benchmarks.answer_f1 import answer_tokens
from pipelines.benchmarks.base import Context, Question
from pipelines.config.benchmarks import ChatRecallSettings
from pipelines.data.conversations import conversations
from pipelines.data.documents import BadRecord


class ChatRecall:
    """One context per conversation; a question's category is how many facts were told, and how long ago.

    ``recalled`` is whether the value is in the answer, ``in_sentences`` whether the answer says it in a sentence or
    more (:func:`is_sentence`).
    """

    max_new_tokens = 32
    stop: tuple[str, ...] = ()
    metrics = ("recalled", "in_sentences")
    drop_first = "oldest"
    writes_questions = True

    def __init__(self, name: str, settings: ChatRecallSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        of = self.settings
        for facts in of.facts:
            for turns in of.turns_after:
                told = conversations(of.conversations, of.seed, "eval", (facts, facts), turns, unseen=of.unseen)
                for number, conversation in enumerate(told):
                    yield _context(conversation, f"{facts}/{number}", facts, turns)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        value, said = answer_tokens(question.extra["value"]), answer_tokens(prediction)
        places = range(len(said) - len(value) + 1)
        return {
            "recalled": float(any(said[place : place + len(value)] == value for place in places)),
            "in_sentences": float(is_sentence(prediction)),
        }


def category(facts: int, turns: int) -> str:
    """The category of questions about conversations of so many facts, so many turns ago."""
    later = f", {turns} turn{'s' * (turns > 1)} later" if turns else ""
    return f"{facts} fact{'s' * (facts > 1)}{later}"


def is_sentence(text: str) -> bool:
    """Whether a text begins with a capital, has three words or more, and ends a sentence."""
    return bool(re.match(r"[^a-z]", text)) and len(text.split()) >= 3 and text.rstrip("\"')”’")[-1:] in (".", "!", "?")


def _context(conversation: dict[str, Any], conversation_id: str, facts: int, turns: int) -> Context:
    context_id = f"{conversation_id}/{turns}"
    questions = [
        Question(
            question_id=f"{context_id}/{number}",
            cluster_id=conversation_id,
            messages=[{"role": "user", "content": fact["question"]}],
            references=[fact["answer"]],
            category=category(facts, turns),
            extra={"value": fact["value"]},
        )
        for number, fact in enumerate(conversation["facts"])
    ]
    return Context(context_id, conversation["messages"], questions)
