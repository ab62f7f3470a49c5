"""What a benchmark is to the evaluation: contexts to remember, questions about them, and a score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from typing import Any, Literal, Protocol

from deltamem.chat.messages import Message
from pipelines.data.documents import BadRecord


@dataclass(frozen=True)
class Question:
    """One question, without the history that it is about.

    Attributes:
        question_id: unique within the benchmark.
        cluster_id: questions of one document or conversation share it; intervals are clustered by it.
        messages: the question as chat messages; the last is the user's. A system message, if any, is the
            first.
        references: accepted answers; the answer NLL is that of the first. None: the frozen backbone's own reply is
            meant, which the evaluation puts there (:mod:`pipelines.evaluation.own_replies`).
        category: the benchmark's own split, such as "bridge"; "" where there is none.
        extra: what the scorer needs besides.
        max_new_tokens: of this answer, where it differs from the benchmark's.
        asked: the bare question, where the message has an instruction besides.
        finished: whether the first reference is a whole answer; after the beginning of one no end is expected.
    """

    question_id: str
    cluster_id: str
    messages: list[Message]
    references: list[str]
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    asked: str = ""
    finished: bool = True

    @property
    def query(self) -> str:
        """What a search for the answer goes by."""
        return self.asked or self.messages[-1]["content"]


@dataclass(frozen=True)
class Context:
    """A history and every question about it; the history is written once for all of them.

    Attributes:
        context_id: unique within the benchmark.
        history: what is written to the memory, or put before the question: chat messages, oldest first,
            none of them the system's.
        questions: at least one.
        written: what is written to the memory where that differs: with a system message in front, or with messages
            that the questions repeat.
    """

    context_id: str
    history: list[Message]
    questions: list[Question]
    written: list[Message] | None = None

    @property
    def to_write(self) -> list[Message]:
        """What is written to the memory."""
        return self.history if self.written is None else self.written


def prompt_messages(question: Question, history: Sequence[Message] = ()) -> list[Message]:
    """The messages of a prompt: the question's system message if it has one, the history, the question."""
    first = 1 if question.messages[0]["role"] == "system" else 0
    return [*question.messages[:first], *history, *question.messages[first:]]


def limit(contexts: Iterable[Context], max_contexts: int | None, max_questions: int | None) -> Iterator[Context]:
    """The first contexts, each with its first questions; None is all."""
    for context in islice(contexts, max_contexts):
        yield replace(context, questions=context.questions[:max_questions])


class Benchmark(Protocol):
    """A benchmark, made by :func:`pipelines.benchmarks.get_benchmark` from its entry in the configuration.

    Attributes:
        name: the entry's name, under which results are reported.
        version: goes up when prompts or scores change, so that results of different versions aren't mixed.
        max_new_tokens: of the greedy answer.
        stop: texts at which an answer ends, besides the end-of-turn token; empty for most.
        metrics: names of the scores, in [0, 1], higher is better; the first is the headline.
        drop_first: which messages of a history that doesn't fit the window are left out of the prompt: the
            "oldest" or the "newest". The memory is written from all of it.
        writes_questions: whether question and answer are written as they are read, as chats do, and not only under
            ``full``.
        bad_records: what of its files could not be used as it is; complete once the contexts have been read.
    """

    name: str
    version: str
    max_new_tokens: int
    stop: tuple[str, ...]
    metrics: tuple[str, ...]
    drop_first: Literal["oldest", "newest"]
    writes_questions: bool
    bad_records: list[BadRecord]

    def contexts(self) -> Iterator[Context]:
        """Every context, in the order of the source. Raises StageError for missing or malformed data."""
        ...

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        """The scores of one answer, by name; a metric that doesn't apply to the question is left out."""
        ...


def first_questions(contexts: Sequence[Context], limit: int) -> list[Context]:
    """``limit`` questions of a benchmark: the first of every context, then the second of every one, and so on."""
    rounds = chain.from_iterable(zip_longest(*(context.questions for context in contexts)))
    chosen = {question.question_id for question in [q for q in rounds if q is not None][:limit]}
    fewer = [
        replace(context, questions=[q for q in context.questions if q.question_id in chosen]) for context in contexts
    ]
    return [context for context in fewer if context.questions]
