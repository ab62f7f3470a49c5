"""One episode per exercise: the document is written into the memory, then the prompt is read and its reply learnt.

Every message of the document is a segment of the sequence-state write. The prompt is a chat of its own, so that nothing
of the document is visible while it is answered but what the source repeats there. A chat's first reply has nothing
written before it: no tokens, and so an empty memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltamem.chat.format import encode_messages, encode_reply_and_part
from deltamem.chat.messages import EncodedMessages, Message
from deltamem.errors import DeltaMemError
from pipelines.data.documents import Document, Exercise
from pipelines.errors import StageError

NO_TEXT = "the {} has no text"
LONG_DOCUMENT = "the {} is longer than max_written_tokens"
LONG_QUESTION = "question and answer are longer than max_read_tokens"


@dataclass
class Episodes:
    """Episodes of one document as rows of ``pipelines.data.shards.SCHEMA``, and the ids of dropped ones by reason.

    ``truncated`` tells that an end of the document was cut off to fit the budget.
    """

    document_id: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class EpisodeEncoder:
    """Turns documents into episodes with a backbone's chat template.

    Where the template changes the texts there are no segments, which only ssw needs and then asks for.

    max_written_tokens bounds the document's tokens, max_read_tokens those of prompt and reply together. A longer
    document is dropped or, with overlong="truncate", loses messages at the end that it names and, if a single one is
    left that is still too long, words of that.

    value_weight is of the tokens of an answer's value, where the source knows one; the answer's others have 1.
    """

    tokenizer: PreTrainedTokenizerBase
    max_written_tokens: int
    max_read_tokens: int
    overlong: Literal["drop", "truncate"]
    value_weight: float = 1.0

    def encode(self, document: Document) -> Episodes:
        """All episodes of a document. Raises StageError if the chat template marks no end of an answer."""
        result = Episodes(document.document_id)
        ids = [exercise.question_id for exercise in document.exercises]
        messages = document.messages
        if all(message["role"] == "system" for message in messages) and not document.empty_memory:
            result.dropped[NO_TEXT.format(document.noun)] = ids
            return result
        context = self._written(messages)
        if len(context.input_ids) > self.max_written_tokens:
            messages = self._shorten(document) if self.overlong == "truncate" else []
            if not messages:
                result.dropped[LONG_DOCUMENT.format(document.noun)] = ids
                return result
            context = self._written(messages)
            result.truncated = True
        written = {
            "paper_id": document.document_id,
            "context_ids": np.array(context.input_ids, dtype=np.int32),
            "segment_ids": np.array(context.segment_ids, dtype=np.int32),
            "messages": messages,
        }
        for exercise in document.exercises:
            read = self._read_part(exercise)
            if len(read["question_ids"]) + len(read["answer_ids"]) > self.max_read_tokens:
                result.dropped.setdefault(LONG_QUESTION, []).append(exercise.question_id)
            else:
                result.rows.append(written | read)
        return result

    def _written(self, messages: list[Message]) -> EncodedMessages:
        # of no messages a template may still make a system's
        return encode_messages(self.tokenizer, messages, segment=None) if messages else EncodedMessages([], [])

    def _read_part(self, exercise: Exercise) -> dict[str, Any]:
        answer = exercise.references[0]
        prompt = encode_messages(self.tokenizer, exercise.prompt, add_generation_prompt=True, segment=None)
        try:
            reply, valued = encode_reply_and_part(
                self.tokenizer, exercise.prompt, answer, exercise.value, exercise.finished
            )
        except DeltaMemError as error:
            raise StageError(
                f"question {exercise.question_id}: its answer has no end to learn ({error}); give the backbone's "
                "tokenizer a chat template with an end-of-turn token"
            ) from error
        return {
            "question_id": exercise.question_id,
            "question": exercise.prompt[-1]["content"],
            "question_ids": np.array(prompt.input_ids, dtype=np.int32),
            "prompt": exercise.prompt,
            "answer": answer,
            "answer_ids": np.array(reply, dtype=np.int32),
            "answer_type": exercise.kind,
            "references": exercise.references,
            "answer_weights": self._weights(valued),
        }

    def _weights(self, valued: list[bool]) -> list[float] | None:
        """Of an answer's tokens, those of its value given; None: all alike."""
        if self.value_weight == 1 or not any(valued):
            return None
        return [self.value_weight if of_value else 1.0 for of_value in valued]

    def _shorten(self, document: Document) -> list[Message]:
        """As much of a document as fits, its system message included; empty if not even one word does."""
        system = [message for message in document.messages[:1] if message["role"] == "system"]
        body = document.messages[len(system) :]
        if kept := self._most(body, lambda part: [*system, *part], document.drop_first):
            return [*system, *kept]
        last = body[0] if document.drop_first == "newest" else body[-1]

        def message(words: list[str]) -> list[Message]:
            return [*system, {**last, "content": " ".join(words)}]

        words = self._most(last["content"].split(" "), message, document.drop_first)
        return message(words) if words else []

    def _most(
        self, parts: list, messages: Callable[[list], list[Message]], drop_first: Literal["oldest", "newest"]
    ) -> list:
        """The longest beginning of some parts (or end, where the oldest go first) whose messages fit."""

        def kept(count: int) -> list:
            return parts[:count] if drop_first == "newest" else parts[len(parts) - count :]

        return kept(bisect.bisect_left(range(1, len(parts) + 1), True, key=lambda n: not self._fits(messages(kept(n)))))

    def _fits(self, messages: list[Message]) -> bool:
        return len(encode_messages(self.tokenizer, messages, segment=None).input_ids) <= self.max_written_tokens
