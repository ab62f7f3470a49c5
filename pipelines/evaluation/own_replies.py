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

    A question whose reply isn't finished after ``limit`` tokens is left out: what has no end can't be compared.

    Args:
        reader: of the model that replies; its memory, if it has one, stays empty.
        batch_size: questions in a pass.

    Raises:
        StageError: no reply is finished.
    """
    asked = {_prompt(q): encoder.question(q) for context in contexts for q in context.questions if not q.references}
    replies: dict[str, str] = {}
    for batch in by_length(asked, batch_size):
        found = own_replies(batch, reader, encoder, limit)
        replies |= {prompt: reply.text for prompt, reply in found.items() if reply.finished and reply.text}
    answered = [
        replace(context, questions=[replace(q, references=q.references or [replies[_prompt(q)]]) for q in questions])
        for context in contexts
        if (questions := [q for q in context.questions if q.references or _prompt(q) in replies])
    ]
    if not answered:
        raise StageError(
            f"The backbone finishes none of its replies to {len(asked)} questions within {limit} tokens, so that there "
            "is nothing to compare with. Set a larger max_new_tokens in the benchmark's entry."
        )
    return answered


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
