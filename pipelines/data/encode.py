"""Papers to rows: encodes a split, on several processes where it is large, and says what became of each question."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipelines.backbones.prepared import load_tokenizer
from pipelines.config import Data
from pipelines.data.episodes import EpisodeEncoder, PaperEpisodes
from pipelines.data.generate import Split
from pipelines.data.papers import Paper
from pipelines.data.shards import write_shards
from pipelines.data.sources import Corpus
from pipelines.errors import StageError

PAPERS_PER_PROCESS = 200
"""A process takes seconds to start, the time of some hundred papers."""

Progress = Callable[[Iterator[PaperEpisodes], int], Iterable[PaperEpisodes]]
"""Passes papers on as they are encoded, and shows how many of that number there were."""


def write_split(
    corpus: Corpus, data: Data, split: Split, tokenizer_folder: Path, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the shards of one split into a folder and returns what the manifest says of them.

    Raises StageError if not one episode is left.
    """
    limit = question_limit(data, split)
    papers = corpus.papers
    tally = Tally()
    with closing(encode_papers(papers, data, tokenizer_folder)) as encoded:
        shown = progress(encoded, len(papers))
        shards = write_shards(tally.count(shown, limit), folder, data.shard_megabytes * 10**6)
    found = sum(len(paper.questions) for paper in papers)
    dropped = {reason: {"count": len(ids), "question_ids": ids} for reason, ids in sorted(tally.dropped.items())}
    if not tally.episodes:
        reasons = "; ".join(f"{reason}: {entry['count']}" for reason, entry in dropped.items())
        raise StageError(
            f"{split}: none of {found} questions gives an episode ({reasons or 'there are no questions'}); "
            "check the data section's files and max_written_tokens, max_read_tokens"
        )
    lost = Counter(record.lost for record in corpus.bad_records)
    return {
        "split": split,
        "source": corpus.origin,
        "papers": len(papers),
        "usable_questions": found,
        "episodes": tally.episodes,
        "dropped": dropped,
        "beyond_limit": found - tally.episodes - sum(entry["count"] for entry in dropped.values()),
        "truncated_papers": tally.truncated,
        "renamed_questions": corpus.renamed_questions,
        "bad_records": {
            "lost": dict(sorted(lost.items())),
            "records": [asdict(r) for r in corpus.bad_records],
        },
        "answer_types": dict(sorted(tally.answer_types.items())),
        "tokens": {name: _statistics(lengths) for name, lengths in tally.lengths.items()},
        "shards": shards,
    }


@dataclass
class Tally:
    """What happened to the questions on their way into the shards."""

    episodes: int = 0
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    truncated: list[str] = field(default_factory=list)
    answer_types: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"written": [], "question": [], "answer": []})

    def count(self, papers: Iterable[PaperEpisodes], limit: int | None) -> Iterator[dict[str, Any]]:
        """Passes the rows on, at most ``limit`` of them, the first in file order."""
        for paper in papers:
            for reason, ids in paper.dropped.items():
                self.dropped[reason] += ids
            if paper.truncated:
                self.truncated.append(paper.paper_id)
            for row in paper.rows:
                self.episodes += 1
                self.answer_types[row["answer_type"]] += 1
                for name, column in zip(self.lengths, ("context_ids", "question_ids", "answer_ids"), strict=True):
                    self.lengths[name].append(len(row[column]))
                yield row
                if self.episodes == limit:
                    return


def encode_papers(papers: list[Paper], data: Data, tokenizer_folder: Path) -> Iterator[PaperEpisodes]:
    """The papers' episodes, in the order of the papers whatever the number of processes."""
    settings = (tokenizer_folder, data.max_written_tokens, data.max_read_tokens, data.overlong)
    processes = min(data.processes, math.ceil(len(papers) / PAPERS_PER_PROCESS))
    if processes <= 1:
        yield from map(make_encoder(*settings).encode, papers)
        return
    # A forked process could inherit a lock that one of the tokenizer's threads holds.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, settings)
    try:
        yield from pool.map(_encode, papers, chunksize=8)
    except BrokenProcessPool:
        raise StageError(
            f"one of {processes} tokenising processes was killed, probably for want of memory; lower data.processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def make_encoder(tokenizer_folder: Path, *limits: Any) -> EpisodeEncoder:
    """An encoder with the tokenizer of a backbone folder."""
    return EpisodeEncoder(load_tokenizer(tokenizer_folder), *limits)


_encoder: EpisodeEncoder


def _start_worker(*settings: Any) -> None:
    global _encoder
    _encoder = make_encoder(*settings)


def _encode(paper: Paper) -> PaperEpisodes:
    return _encoder.encode(paper)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what decides the tokens: vocabulary, merges, added tokens and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def question_limit(data: Data, split: Split) -> int | None:
    """How many questions of a split are taken at most; None: all."""
    return data.max_train_questions if split == "train" else data.max_eval_questions


def estimated_bytes(papers: list[Paper], data: Data, split: Split) -> int:
    """About what the shards will take: per question its paper's text and, per 4 bytes of it, two int32."""
    total = questions = 0
    for paper in papers:
        texts = [
            paper.title,
            paper.abstract,
            *(text for section in paper.sections for text in section.paragraphs),
        ]
        written = sum(len(text.encode()) for text in texts)
        questions += len(paper.questions)
        total += len(paper.questions) * min(3 * written, 12 * data.max_written_tokens)
    limit = question_limit(data, split)
    return total * limit // questions if limit and limit < questions else total


def _statistics(lengths: list[int]) -> dict[str, float]:
    return {
        "min": min(lengths),
        "median": float(np.median(lengths)),
        "max": max(lengths),
        "total": sum(lengths),
    }
