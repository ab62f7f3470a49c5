"""BM25 RAG: the model reads the passages that share most words with the question.

The paper names the method and gives neither the length nor the number of its passages; both are settings
here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.benchmarks.base import Context
from pipelines.config.strategies import Bm25Strategy
from pipelines.strategies.passages import Index, asked_alone, best
from pipelines.strategies.transform import ContextTransform


class Bm25(ContextTransform[Bm25Strategy]):
    """Every question gets a history of its own: the best passages, in the order of the whole history."""

    def __call__(self, context: Context) -> Iterator[Context]:
        index = Index(context.history, self.settings.passage_characters)
        for question in context.questions:
            chosen = best(index.relevance(question.query), self.settings.top_k)
            yield asked_alone(context, question, [index.passages[number].text for number in chosen])
