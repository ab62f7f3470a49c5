"""Asks every question of a benchmark under each condition, going through every history once.

Histories are written, or read into the prompt, in batches of similar length; all questions of a context share
the memory and the cache that this leaves. Records are logged batch by batch, and what the log has isn't asked
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Literal, NamedTuple, TypeVar, cast

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel, DeltaMemory
from deltamem.backbone.facts import end_ids, window
from deltamem.chat.messages import EncodedMessages
from deltamem.model import backbone_of, segment_of
from pipelines.benchmarks.base import Benchmark, Context, Question
from pipelines.config.conditions import Condition, condition
from pipelines.errors import StageError
from pipelines.evaluation.passes import Reader, Rows, reader_of
from pipelines.evaluation.prompts import FullPrompts, PromptEncoder
from pipelines.evaluation.records import Record, RecordLog
from pipelines.evaluation.sampling import Draws, Sampling
from pipelines.evaluation.swap import permute_layers, swap_layer, swap_partners, unrelated
from pipelines.run.progress import Meter

TOKENS_PER_PASS = 16_384
"""Tokens of histories, with padding, in one pass: enough to keep a GPU busy, few enough for its memory."""

_NOTHING = EncodedMessages([], [])
_Encoded = TypeVar("_Encoded")


class Task(NamedTuple):
    """A question to ask, and where it starts from.

    Attributes:
        row: the memory, or the row of the cache, that it starts from.
        unread: tokens of its prompt that the row hasn't read.
        left_out: messages of the history that the prompt has no room for.
    """

    question: Question
    row: int
    unread: EncodedMessages
    left_out: int = 0


class Examiner:
    """One model on the contexts of one benchmark.

    Args:
        batch_size: rows in a pass, at most.
        max_new_tokens: bounds the benchmark's own limits of an answer; None doesn't.
        cache_bytes: of keys and values in one batch of questions whose histories are in the prompt. At the peak about
            three times as much is in use.
        sampling: how answers are drawn; None: they are greedy.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        contexts: Sequence[Context],
        reader: Reader,
        encoder: PromptEncoder,
        log: RecordLog,
        batch_size: int,
        max_new_tokens: int | None,
        cache_bytes: int,
        console: Console,
        sampling: Sampling | None = None,
    ):
        self.benchmark, self.contexts = benchmark, contexts
        self.reader, self.encoder, self.log = reader, encoder, log
        self.batch_size, self.max_new_tokens, self.cache_bytes = batch_size, max_new_tokens, cache_bytes
        self.console, self.sampling = console, sampling
        self._answers = {
            question.question_id: encoder.answer(question) for context in contexts for question in context.questions
        }

    def run(self, conditions: Sequence[str]) -> None:
        """Asks what the log doesn't have yet; contexts without a history under ``none`` and ``full`` only.

        Raises:
            StageError: ``swapped`` has no other document to swap with, a question doesn't fit the window, or the
                model answers with what is no number.
        """
        how = {name: condition(name) for name in conditions}
        whose = {name: one.written_from for name, one in how.items()}
        written_from = {name: self._sources(one) for name, one in whose.items() if one is not None}
        waiting = {
            name: [
                (context, questions)
                for context in self.contexts
                if name not in written_from or context.context_id in written_from[name]
                if (questions := self._unasked(name, context))
            ]
            for name in conditions
        }
        needed = {sources[context.context_id] for name, sources in written_from.items() for context, _ in waiting[name]}
        if any(one.layer_swapped is not None for one in how.values()):
            needed |= {partner for context_id, partner in swap_partners(self.contexts).items() if context_id in needed}
        total = sum(len(questions) for asked in waiting.values() for _, questions in asked)
        with Meter(total, self.console) as self.meter:
            corpus = [unrelated(c) for c in self.contexts if c.to_write] if "corpus" in whose.values() else []
            memory, row_of = self._write_memories([c for c in (*self.contexts, *corpus) if c.context_id in needed])
            for name, asked in waiting.items():
                self.meter.step(name)
                if how[name].history_in_prompt:
                    self._ask_full(asked)
                else:
                    found = self._as_found(how[name], memory, row_of) if memory else None
                    with self.reader.steered(how[name].strength):
                        self._ask_alone(name, asked, written_from.get(name), found, row_of)

    def _sources(self, whose: Literal["own", "other", "corpus"]) -> dict[str, str]:
        """The context whose history each context's memory is written from; those without a history are left out."""
        if whose == "other":
            return swap_partners(self.contexts)
        with_history = [context for context in self.contexts if context.to_write]
        return {c.context_id: (unrelated(c) if whose == "corpus" else c).context_id for c in with_history}

    def _as_found(self, how: Condition, memory: DeltaMemory, row_of: dict[str, int]) -> DeltaMemory:
        """The memories of all histories as a condition has the questions find them."""
        if how.layers_permuted:
            return permute_layers(memory)
        if how.layer_swapped is None:
            return memory
        partners = swap_partners(self.contexts)
        # what is asked nothing, a partner or a corpus, may have no partner's memory: it keeps its own
        rows = [row_of.get(partners.get(context_id, context_id), row) for context_id, row in row_of.items()]
        return swap_layer(memory, how.layer_swapped, rows)

    def _unasked(self, condition: str, context: Context) -> list[Question]:
        return [q for q in context.questions if not self.log.has(condition, q.question_id)]

    def _ask_alone(
        self,
        condition: str,
        asked: Sequence[tuple[Context, list[Question]]],
        written_from: dict[str, str] | None,
        memory: DeltaMemory | None,
        row_of: dict[str, int],
    ) -> None:
        """The question without the history; the memory is the row of ``written_from``'s context, or empty."""
        tasks = [
            Task(
                question,
                row_of[written_from[context.context_id]] if written_from else 0,
                self.encoder.question(question),
            )
            for context, questions in asked
            for question in questions
        ]

        def start(rows: list[int]) -> Rows:
            return self.reader.start(len(rows), memory.select(rows) if memory and written_from else None)

        # read only, if it isn't a chat: the conditions are to differ in the memory they find and in nothing else
        self._ask(condition, tasks, start, write=self.benchmark.writes_questions, at_once=self.batch_size)

    # --- histories -----------------------------------------------------------------------------------------

    def _write_memories(self, contexts: Sequence[Context]) -> tuple[DeltaMemory | None, dict[str, int]]:
        """The memory of every context's history, one row each, and the row of each context id."""
        memories, row_of = [], {}
        self.meter.step("writing")
        for group in self._groups(contexts, self._encode_history):
            with self.reader.cost("write") as cost:
                memories.append(self._write([pieces for _, pieces in group], None))
            self.log.add([], cost)
            row_of |= {context.context_id: len(row_of) + row for row, (context, _) in enumerate(group)}
        return DeltaMemory.cat(memories) if memories else None, row_of

    def _write(self, histories: Sequence[Sequence[EncodedMessages]], memory: DeltaMemory | None) -> DeltaMemory | None:
        """Writes the pieces of each row's history one after the other; a row may have none."""
        for step in zip_longest(*histories, fillvalue=_NOTHING):
            memory = self.reader.write(step, memory)
        return memory

    def _encode_history(self, context: Context) -> tuple[list[EncodedMessages], int]:
        pieces = self.encoder.history(context.to_write)
        return pieces, max(len(piece.input_ids) for piece in pieces)

    def _ask_full(self, asked: Sequence[tuple[Context, list[Question]]]) -> None:
        """History and question in the prompt, written as they are read."""
        questions_of = {context.context_id: questions for context, questions in asked}
        for group in self._groups([context for context, _ in asked], self._encode_full):
            with self.reader.cost("full") as cost:
                rows = self._read_beginnings([prompts for _, prompts in group])
            self.log.add([], cost)
            tasks = [
                Task(question, row, tail, len(prompts.left_out))
                for row, (context, prompts) in enumerate(group)
                for question, tail in zip(context.questions, prompts.tails, strict=True)
                if question in questions_of[context.context_id]
            ]
            at_once = self.cache_bytes // max(1, rows.cache_bytes // len(group))
            if len(tasks) > max(at_once, len(group)) and self.reader.shares_beginnings:
                self._ask_after_beginnings(tasks, rows)
            else:
                self._ask("full", tasks, rows.select, write=True, at_once=min(max(1, at_once), self.batch_size))

    def _ask_after_beginnings(self, tasks: Sequence[Task], rows: Rows) -> None:
        """One beginning after the other: a copy of its keys and values for every question would not fit."""
        of_token = max(1, rows.cache_bytes // rows.mask.numel())
        for row in sorted({task.row for task in tasks}):
            mine = [task._replace(row=0) for task in tasks if task.row == row]
            own = max(len(task.unread.input_ids) + self._limit(task.question) for task in mine)
            at_once = max(1, self.cache_bytes // (of_token * own))
            self._ask("full", mine, rows.beginning(row).select, write=True, at_once=min(at_once, self.batch_size))

    def _encode_full(self, context: Context) -> tuple[FullPrompts, int]:
        room = max(max(len(self._answers[q.question_id]), self._limit(q)) for q in context.questions)
        prompts = self.encoder.full(context, room, self.benchmark.drop_first)
        return prompts, len(prompts.beginning.input_ids)

    def _read_beginnings(self, prompts: Sequence[FullPrompts]) -> Rows:
        """Reads the shared beginnings; what they have no room for is written before or after, in its turn."""
        left_out = [self.encoder.history(prompt.left_out) if prompt.left_out else [] for prompt in prompts]
        if not self.reader.has_memory:
            left_out = []
        memory = self._write(left_out, None) if self.benchmark.drop_first == "oldest" else None
        rows = self.reader.read(
            self.reader.start(len(prompts), memory), [prompt.beginning for prompt in prompts], write=True
        )
        if self.benchmark.drop_first == "newest":
            rows = replace(rows, memory=self._write(left_out, rows.memory))
        return rows

    def _groups(
        self, contexts: Sequence[Context], encode: Callable[[Context], tuple[_Encoded, int]]
    ) -> Iterator[list[tuple[Context, _Encoded]]]:
        """Contexts of similar length, encoded, that fit one pass; ``encode`` tells their tokens as well.

        The longest come first: what is too much for the machine then fails at once.
        """
        group: list[tuple[Context, _Encoded]] = []
        longest = 0
        for context in sorted(contexts, key=lambda c: sum(len(m["content"]) for m in c.to_write), reverse=True):
            encoded, length = encode(context)
            longest = max(longest, length)
            if group and (len(group) == self.batch_size or (len(group) + 1) * longest > TOKENS_PER_PASS):
                yield group
                group, longest = [], length
            group.append((context, encoded))
        if group:
            yield group

    # --- questions -----------------------------------------------------------------------------------------

    def _ask(
        self,
        condition: str,
        tasks: Sequence[Task],
        start: Callable[[list[int]], Rows],
        write: bool,
        at_once: int,
    ) -> None:
        """Asks tasks in batches of similar length and logs their records.

        ``start`` makes the rows that a batch goes on from.
        """
        ordered = sorted(tasks, key=lambda task: (self._limit(task.question), len(task.unread.input_ids)))
        for batch in (ordered[i : i + at_once] for i in range(0, len(ordered), at_once)):
            with self.reader.cost(condition) as cost:
                body = [EncodedMessages(*(tokens[:-1] for tokens in task.unread)) for task in batch]
                last = [task.unread.input_ids[-1] for task in batch]
                answers = [self._answers[task.question.question_id] for task in batch]
                rows = self.reader.read(start([task.row for task in batch]), body, write)
                nlls = self.reader.answer_nll(rows, last, answers, write)
                draws = self.sampling and Draws(self.sampling, [task.question.question_id for task in batch])
                limits = [self._limit(task.question) for task in batch]
                generated = self.reader.generate(rows, last, limits, write, draws)
            records = [self._record(condition, *parts) for parts in zip(batch, nlls, generated, strict=True)]
            self.log.add(records, cost)
            self.meter.advance(len(batch))

    def _limit(self, question: Question) -> int:
        limit = question.max_new_tokens or self.benchmark.max_new_tokens
        return min(limit, self.max_new_tokens or limit)

    def _record(self, condition: str, task: Task, nll: float, generated: list[int]) -> Record:
        if not math.isfinite(nll):
            raise StageError(
                f"Question {task.question.question_id} under {condition!r}: the model's likelihood of the reference is "
                f"{nll}. Its training has diverged (lower train.learning_rate and train again), or its numbers don't "
                "fit the backbone's dtype (float16 has the smallest range)."
            )
        prediction = cast(str, self.encoder.tokenizer.decode(generated, skip_special_tokens=True))
        for stop in self.benchmark.stop:
            prediction = prediction.split(stop, 1)[0]
        prediction = prediction.strip()
        scores = self.benchmark.score(task.question, prediction)
        return {
            "question_id": task.question.question_id,
            "cluster_id": task.question.cluster_id,
            "category": task.question.category,
            "condition": condition,
            "question": task.question.messages[-1]["content"],
            "nll": nll,
            **{metric: scores.get(metric) for metric in self.benchmark.metrics},
            "prediction": prediction,
            "references": list(task.question.references),
            "left_out": task.left_out,
        }


def reader_and_encoder(
    model: DeltaMemModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    write_tokens: int | None = None,
) -> tuple[Reader, PromptEncoder]:
    """What runs the model and what makes its prompts; any question shows how an answer ends, any answer will do."""
    base = backbone_of(model)
    encoder = PromptEncoder(tokenizer, segment_of(model), window(base.config), write_tokens)
    ends = end_ids(base, tokenizer) | {encoder.answer(replace(question, references=["Yes."]))[-1]}
    return reader_of(model, sorted(ends), tokenizer.pad_token_id), encoder
