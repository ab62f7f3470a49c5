"""Documents to rows: encodes a split, on several processes where it is large, and says what became of each question."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipelines.backbones.prepared import load_tokenizer
from pipelines.config import Data
from pipelines.data.documents import Corpus, Document, Split
from pipelines.data.episodes import EpisodeEncoder, Episodes
from pipelines.data.shards import MIXTURE_SCHEMA, PAPER_SCHEMA, SCHEMA, write_shards
from pipelines.data.spool import Spool
from pipelines.errors import StageError

DOCUMENTS_PER_PROCESS = 200
"""A process takes seconds to start, the time of some hundred papers."""

Progress = Callable[[Iterator[Episodes], int], Iterable[Episodes]]
"""Passes documents on as they are encoded, and shows how many of that number there were."""


def write_split(
    corpora: Mapping[str, Corpus], data: Data, split: Split, encoders: Encoders, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the shards of one split into a folder and returns what the manifest says of them.

    The rows of one source follow on those of another. Raises StageError if one has not one episode left.
    """
    limit = question_limit(data, split)
    weights = {name: value_weight(data, name, split) for name in corpora}
    tallies = {name: Tally() for name in corpora}

    def rows() -> Iterator[dict[str, Any]]:
        for name, corpus in corpora.items():
            with closing(encoders.encode(corpus.documents, weights[name])) as encoded:
                counted = tallies[name].count(progress(encoded, len(corpus.documents)), limit)
                yield from counted if data.source else _of_source(name, counted)
            _check(tallies[name], corpus, split if data.source else f"{split}: data.sources.{name}")

    weighed = SCHEMA if any(weight != 1 for weight in weights.values()) else MIXTURE_SCHEMA
    shards = write_shards(rows(), folder, data.shard_megabytes * 10**6, PAPER_SCHEMA if data.source else weighed)
    told = {name: _told(corpora[name], tallies[name]) for name in corpora}
    if data.source:
        return {"split": split, **next(iter(told.values())), "shards": shards}
    totals = {key: sum(entry[key] for entry in told.values()) for key in ("papers", "usable_questions", "episodes")}
    return {"split": split, **totals, "sources": told, "shards": shards}


def _of_source(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows under the name of their source, which also keeps its ids apart from those of others."""
    for row in rows:
        ids = {key: f"{name}/{row[key]}" for key in ("paper_id", "question_id")}
        yield row | ids | {"source": name}


def _check(tally: Tally, corpus: Corpus, where: str) -> None:
    if not tally.episodes:
        reasons = "; ".join(f"{reason}: {len(ids)}" for reason, ids in sorted(tally.dropped.items()))
        raise StageError(
            f"{where}: none of {corpus.questions} questions gives an episode ({reasons or 'there are no questions'}); "
            "check the data section's files and max_written_tokens, max_read_tokens"
        )


def _told(corpus: Corpus, tally: Tally) -> dict[str, Any]:
    """What the manifest says of one source."""
    dropped: dict[str, dict[str, Any]] = {
        reason: {"count": len(ids), "question_ids": ids} for reason, ids in sorted(tally.dropped.items())
    }
    lost = Counter(record.lost for record in corpus.bad_records)
    questions = corpus.questions
    return {
        "source": corpus.origin,
        "papers": len(corpus.documents),
        "usable_questions": questions,
        "episodes": tally.episodes,
        "dropped": dropped,
        "beyond_limit": questions - tally.episodes - sum(entry["count"] for entry in dropped.values()),
        "truncated_papers": tally.truncated,
        "renamed_questions": corpus.renamed_questions,
        "renamed_documents": corpus.renamed_documents,
        "bad_records": {
            "lost": dict(sorted(lost.items())),
            "records": [asdict(r) for r in corpus.bad_records],
        },
        "answer_types": dict(sorted(tally.answer_types.items())),
        "tokens": {name: _statistics(lengths) for name, lengths in tally.lengths.items()},
    }


@dataclass
class Tally:
    """What happened to the questions on their way into the shards."""

    episodes: int = 0
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    truncated: list[str] = field(default_factory=list)
    answer_types: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {name: array("I") for name in ("written", "question", "answer")}
    )

    def count(self, documents: Iterable[Episodes], limit: int | None) -> Iterator[dict[str, Any]]:
        """Passes the rows on, at most ``limit`` of them, the first in file order."""
        for document in documents:
            for reason, ids in document.dropped.items():
                self.dropped[reason] += ids
            if document.truncated:
                self.truncated.append(document.document_id)
            for row in document.rows:
                self.episodes += 1
                self.answer_types[row["answer_type"]] += 1
                for name, column in zip(self.lengths, ("context_ids", "question_ids", "answer_ids"), strict=True):
                    self.lengths[name].append(len(row[column]))
                yield row
                if self.episodes == limit:
                    return


class Encoders:
    """Encodes documents here or, where they are many, on processes, which are started once for all of a stage.

    A context: what it started ends with it.
    """

    def __init__(self, data: Data, tokenizer_folder: Path):
        self._most = data.processes
        self._settings = (tokenizer_folder, data.max_written_tokens, data.max_read_tokens, data.overlong)
        self._started = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._started.close()

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        """Starts each of its processes when it is needed."""
        # A forked process could inherit a lock that one of the tokenizer's threads holds.
        pool = ProcessPoolExecutor(self._most, get_context("spawn"), _start_worker, self._settings)
        return self._started.enter_context(pool)

    @cached_property
    def _here(self) -> EpisodeEncoder:
        return make_encoder(*self._settings)

    def encode(self, documents: Spool[Document], value_weight: float = 1.0) -> Generator[Episodes]:
        """The documents' episodes, in their order whatever the number of processes."""
        processes = min(self._most, math.ceil(len(documents) / DOCUMENTS_PER_PROCESS))
        if processes <= 1:
            yield from map(replace(self._here, value_weight=value_weight).encode, documents)
            return
        try:
            waiting: deque[Future[list[Episodes]]] = deque()
            rest = iter(documents)
            while chunk := list(islice(rest, 8)):
                waiting.append(self._pool.submit(_encode, chunk, value_weight))
                if len(waiting) > 4 * processes:  # all at once would be all of them in memory
                    yield from waiting.popleft().result()
            for last in waiting:
                yield from last.result()
        except BrokenProcessPool:
            raise StageError(
                f"one of {self._most} tokenising processes was killed, probably for want of memory; lower "
                "data.processes"
            ) from None
        finally:
            for left in waiting:  # of questions beyond the limit
                left.cancel()


def make_encoder(tokenizer_folder: Path, *settings: Any) -> EpisodeEncoder:
    """An encoder with the tokenizer of a backbone folder."""
    return EpisodeEncoder(load_tokenizer(tokenizer_folder), *settings)


_encoder: EpisodeEncoder


def _start_worker(*settings: Any) -> None:
    global _encoder
    _encoder = make_encoder(*settings)


def _encode(documents: list[Document], value_weight: float) -> list[Episodes]:
    encoder = replace(_encoder, value_weight=value_weight)
    return [encoder.encode(document) for document in documents]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what decides the tokens: vocabulary, merges, added tokens and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def question_limit(data: Data, split: Split) -> int | None:
    """How many questions of a split are taken at most, from each source; None: all."""
    return data.max_train_questions if split == "train" else data.max_eval_questions


def value_weight(data: Data, source: str, split: Split) -> float:
    """What a token of an answer's value counts in a source; held-out answers are weighed evenly, whatever is learnt."""
    return getattr(data.named_sources[source], "value_weight", 1.0) if split == "train" else 1.0


def estimated_bytes(documents: Spool[Document], data: Data, split: Split) -> int:
    """About what the shards will take: per question its document's text and, per 4 bytes of it, two int32."""
    total = questions = 0
    for document in documents:
        written = sum(len(message["content"].encode()) for message in document.messages)
        questions += len(document.exercises)
        total += len(document.exercises) * min(3 * written, 12 * data.max_written_tokens)
    limit = question_limit(data, split)
    return total * limit // questions if limit and limit < questions else total


def _statistics(lengths: array[int]) -> dict[str, float]:
    return {
        "min": min(lengths),
        "median": float(np.median(lengths)),
        "max": max(lengths),
        "total": sum(lengths),
    }
