"""MemoryBank: summaries, and recall with a forgetting curve (Zhong et al. 2023, arXiv 2305.10250).

After the paper's description: the history is stored as passages; every session (here: message of the history)
is summarised; what is recalled for a question is put before it with the summaries; what isn't recalled is
forgotten after Ebbinghaus, R = exp(-t/S), where t counts from the last recall and S grows by one with every
recall.

What is simpler here, and why:

- Relevance is BM25 instead of the distance of sentence embeddings, which would need a further model.
- Instead of deleting a passage with probability 1 - R, its relevance is multiplied by R, its expectation.
- t is counted in sessions, divided by ``lifetime``; the benchmarks' histories have no common clock.
- There is no portrait of the user's personality: no benchmark asks for it.
- Questions are asked in their order, and a recall strengthens a passage for the questions after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.benchmarks.base import Context
from pipelines.config.strategies import MemoryBankStrategy
from pipelines.strategies.passages import Index, asked_alone, best
from pipelines.strategies.transform import ContextTransform


class MemoryBank(ContextTransform[MemoryBankStrategy]):
    """Every question gets the summaries of all sessions and the passages recalled for it."""

    def __call__(self, context: Context) -> Iterator[Context]:
        index = Index(context.history, self.settings.passage_characters)
        summaries = self._summaries(context)
        age = len(context.history) - np.array([passage.message for passage in index.passages], dtype=float)
        strength = np.ones(len(index.passages))
        for question in context.questions:
            retention = np.exp(-age / (strength * self.settings.lifetime))
            recalled = best(index.relevance(question.query) * retention, self.settings.top_k)
            strength[recalled] += 1
            age[recalled] = 0
            texts = [index.passages[number].text for number in recalled]
            yield asked_alone(context, question, summaries + texts)

    def _summaries(self, context: Context) -> list[str]:
        if not self.settings.summary_tokens or not context.history:
            return []
        written = self.summarise([message["content"] for message in context.history], self.settings.summary_tokens)
        lines = [f"{number}. {text.strip()}" for number, text in enumerate(written, start=1)]
        return ["Summary of what happened, in order:\n" + "\n".join(lines)]
