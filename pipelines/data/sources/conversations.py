"""Conversations that a person tells facts in (``pipelines.data.conversations``): written, then asked for each fact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.config.data import ConversationsSource
from pipelines.data.conversations import conversations
from pipelines.data.documents import Corpus, Document, Exercise, Split


def load(settings: ConversationsSource, split: Split, folder: Path) -> Corpus:
    """The conversations of a split; what evaluation asks for doesn't depend on how many there are to train on."""
    count = settings.train_conversations if split == "train" else settings.eval_conversations
    made = list(conversations(count, settings.seed, split, (1, settings.max_facts)))
    share = settings.unknown_share
    documents = [
        # spread evenly over the conversations
        _document(f"{split}-{number}", conversation, int((number + 1) * share) > int(number * share))
        for number, conversation in enumerate(made)
    ]
    drawn = settings.model_dump(include=set(ConversationsSource.__annotations__))
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    return Corpus(documents, [], {"generated": drawn, "sha256": digest})


def _document(document_id: str, conversation: dict[str, Any], with_unknown: bool) -> Document:
    asked = [(fact["question"], [fact["answer"], fact["value"]], "told") for fact in conversation["facts"]]
    if with_unknown:
        asked.append((conversation["unknown"]["question"], [conversation["unknown"]["answer"]], "unknown"))
    exercises = [
        Exercise(f"{document_id}/{number}", [{"role": "user", "content": question}], references, kind)
        for number, (question, references, kind) in enumerate(asked)
    ]
    return Document(document_id, conversation["messages"], exercises, "conversation", drop_first="oldest")
