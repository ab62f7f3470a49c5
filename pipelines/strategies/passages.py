"""Histories in pieces that can be searched by words (Okapi BM25)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rank_bm25 import BM25Okapi

from pipelines.benchmarks.base import Context, Question
from pipelines.data.chunks import cut_text

if TYPE_CHECKING:
    from deltamem.chat.messages import Message


@dataclass(frozen=True)
class Passage:
    """A piece of the history, and the number of the message that it is from."""

    text: str
    message: int


class Index:
    """The passages of a history.

    A message of more than ``longest`` characters is cut; every piece but the first is put under the message's
    first line, which in the benchmarks holds its date or title.
    """

    def __init__(self, history: Sequence[Message], longest: int) -> None:
        self.passages = [
            Passage(text, number)
            for number, message in enumerate(history)
            for text in _pieces(message["content"], longest)
        ]
        words = [_words(passage.text) for passage in self.passages]
        self._bm25 = BM25Okapi(words) if any(words) else None

    def relevance(self, query: str) -> NDArray[np.float64]:
        """The BM25 score of every passage, [passages]; at least 0."""
        if self._bm25 is None:
            return np.zeros(len(self.passages))
        return np.maximum(self._bm25.get_scores(_words(query)), 0.0)


def best(scores: NDArray[np.float64], count: int) -> list[int]:
    """The numbers of the highest scores, in rising order of the numbers; of equal ones the first."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def asked_alone(context: Context, question: Question, texts: Sequence[str]) -> Context:
    """A context of one question whose history are these texts."""
    history = [{"role": "user", "content": text} for text in texts]
    return replace(context, context_id=question.question_id, history=history, questions=[question])


def _pieces(text: str, longest: int) -> list[str]:
    pieces = cut_text(text, longest)
    head = text.strip().split("\n", 1)[0]
    if len(pieces) < 2 or len(head) >= longest / 4:  # a first line that long is text, not a heading
        return pieces
    return pieces[:1] + [f"{head}\n{piece}" for piece in pieces[1:]]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
