"""Conversations that a person tells facts in (``pipelines.data.conversations``): written, then asked for each fact."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from pipelines.config.data import ConversationsSource, SquadSource
from pipelines.data.conversations import conversations
from pipelines.data.documents import Document, Exercise, Reading, Split
from pipelines.data.draw import pick
from pipelines.data.look_alikes import MADE_UP, Words
from pipelines.data.sources import squad


def load(settings: ConversationsSource, split: Split, folder: Path) -> Reading:
    """The conversations of a split; what evaluation asks for doesn't depend on how many there are to train on."""
    training = split == "train"
    count = settings.train_conversations if training else settings.eval_conversations
    new_values, words = (settings.new_values, _words(settings, folder)) if training else (0.0, MADE_UP)
    made = list(conversations(count, settings.seed, split, (1, settings.max_facts), new_values=new_values, words=words))
    documents = []
    for number, conversation in enumerate(made):
        documents.append(_document(f"{split}-{number}", conversation, _is_one_of(settings.unknown_share, number)))
        if training and _is_one_of(settings.reply_share, number):
            reply = _reply(f"{split}-{number}/reply", conversation, settings.seed)
            documents += [reply] if reply else []
    drawn = settings.model_dump(include=set(ConversationsSource.__annotations__))
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return Reading(documents, [], {"generated": drawn, "sha256": digest})


def _is_one_of(share: float, number: int) -> bool:
    """Such a share of all numbers, spread evenly."""
    return int((number + 1) * share) > int(number * share)


def _words(settings: ConversationsSource, folder: Path) -> Words:
    """The answers of the files' questions. Raises StageError as that source does."""
    if not settings.word_files:
        return MADE_UP
    texts = SquadSource(kind="squad", train_files=settings.word_files, eval_files=settings.word_files)
    answered = (
        exercise for document in squad.load(texts, "train", folder).documents for exercise in document.exercises
    )
    return Words.of(exercise.references[0] for exercise in answered)


def _reply(document_id: str, conversation: dict[str, Any], seed: int) -> Document | None:
    """One of the turns after the first that tell something, with those before it written; None if there is none."""
    telling = sorted({fact["told_in"] for fact in conversation["facts"]} - {0})
    if not telling:
        return None
    place = pick(random.Random(f"{seed}/{document_id}"), telling)
    messages = conversation["messages"]
    said, reply = messages[place : place + 2]
    exercise = Exercise(document_id, [said], [reply["content"]], "reply")
    return Document(document_id, messages[:place], [exercise], "conversation", drop_first="oldest")


def _document(document_id: str, conversation: dict[str, Any], with_unknown: bool) -> Document:
    facts = conversation["facts"]
    asked = [(fact["question"], [fact["answer"], fact["value"]], "told", fact["value"]) for fact in facts]
    if with_unknown:
        asked.append((conversation["unknown"]["question"], [conversation["unknown"]["answer"]], "unknown", ""))
    exercises = [
        Exercise(f"{document_id}/{number}", [{"role": "user", "content": question}], references, kind, value)
        for number, (question, references, kind, value) in enumerate(asked)
    ]
    return Document(document_id, conversation["messages"], exercises, "conversation", drop_first="oldest")
