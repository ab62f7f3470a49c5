"""References that are the model's own replies, for questions that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from deltamem.chat.messages import EncodedMessages
from pipelines.benchmarks.base import Context, Question
from pipelines.errors import StageError
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder


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
    replies = _replies(asked, reader, encoder, limit, batch_size)
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


def _replies(
    asked: dict[str, EncodedMessages], reader: Reader, encoder: PromptEncoder, limit: int, batch_size: int
) -> dict[str, str]:
    """The finished replies, by question."""
    replies: dict[str, str] = {}
    ordered = sorted(asked, key=lambda prompt: len(asked[prompt].input_ids))
    for batch in (ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)):
        body = [EncodedMessages(*(tokens[:-1] for tokens in asked[prompt])) for prompt in batch]
        last = [asked[prompt].input_ids[-1] for prompt in batch]
        rows = reader.read(reader.start(len(batch)), body, write=False)
        for prompt, tokens in zip(batch, reader.generate(rows, last, [limit] * len(batch), write=False), strict=True):
            reply = cast(str, encoder.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            if len(tokens) < limit and reply:
                replies[prompt] = reply
    return replies


def _prompt(question: Question) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in question.messages)
