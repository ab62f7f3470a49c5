"""References that are the model's own replies, for questions that have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

from deltamem.chat.messages import EncodedMessages
from pipelines.benchmarks.base import Context, Question
from pipelines.errors import StageError
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder


class OwnReply(NamedTuple):
    """A model's greedy reply, or as much of it as there was room for."""

    text: str
    finished: bool


def with_own_replies(
    contexts: Sequence[Context], reader: Reader, encoder: PromptEncoder, limit: int, batch_size: int
) -> list[Context]:
    """Contexts whose questions without references have the model's greedy reply, of the question alone, as theirs.

    Of a reply that isn't finished after ``limit`` tokens they have the beginning. What hasn't a category yet has "whole
    replies" or "beginnings of longer ones". A question to which nothing is said is left out.

    Args:
        reader: of the model that replies; its memory, if it has one, stays empty.
        batch_size: questions in a pass.

    Raises:
        StageError: nothing is said to any.
    """
    asked = {_prompt(q): encoder.question(q) for context in contexts for q in context.questions if not q.references}
    replies: dict[str, OwnReply] = {}
    for batch in by_length(asked, batch_size):
        found = own_replies(batch, reader, encoder, limit)
        replies |= {prompt: reply for prompt, reply in found.items() if reply.text}
    answered = [
        replace(context, questions=[q if q.references else _answered(q, replies[_prompt(q)]) for q in questions])
        for context in contexts
        if (questions := [q for q in context.questions if q.references or _prompt(q) in replies])
    ]
    if not answered:
        raise StageError(
            f"The backbone says nothing to any of {len(asked)} questions: there is nothing to compare with."
        )
    return answered


def _answered(question: Question, reply: OwnReply) -> Question:
    category = question.category or ("whole replies" if reply.finished else "beginnings of longer ones")
    return replace(question, references=[reply.text], category=category, finished=reply.finished)


def by_length(asked: Mapping[str, EncodedMessages], batch_size: int) -> Iterator[dict[str, EncodedMessages]]:
    """Prompts in batches of similar length, the shortest first."""
    ordered = sorted(asked, key=lambda name: len(asked[name].input_ids))
    for start in range(0, len(ordered), batch_size):
        yield {name: asked[name] for name in ordered[start : start + batch_size]}


def own_replies(
    batch: Mapping[str, EncodedMessages], reader: Reader, encoder: PromptEncoder, limit: int
) -> dict[str, OwnReply]:
    """The greedy replies of at most ``limit`` tokens to a batch of prompts, by name."""
    body = [EncodedMessages(*(tokens[:-1] for tokens in prompt)) for prompt in batch.values()]
    last = [prompt.input_ids[-1] for prompt in batch.values()]
    rows = reader.read(reader.start(len(batch)), body, write=False)
    replies = reader.generate(rows, last, [limit] * len(batch), write=False)
    return {
        name: OwnReply(
            cast(str, encoder.tokenizer.decode(tokens, skip_special_tokens=True)).strip(), len(tokens) < limit
        )
        for name, tokens in zip(batch, replies, strict=True)
    }


def _prompt(question: Question) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in question.messages)
