"""How much a memory holds: papers of more and more facts about invented systems, and questions for single facts.

The papers are the generator's (:mod:`pipelines.data.generate`): a value is one of 12 to 16 words, and nothing but
having read the paper tells which. Questions are drawn from the whole paper, so that what was written first counts as
much as what was written last. A system's name may occur in training papers too, with facts drawn apart, so that they
help no one here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pipelines.benchmarks.base import Context, Question
from pipelines.benchmarks.mab_scores import text_scores
from pipelines.config import Generated
from pipelines.config.benchmarks import FactsSettings
from pipelines.data.documents import BadRecord
from pipelines.data.generate import generate_papers
from pipelines.data.papers import Paper, paper_messages, parse_papers


class Facts:
    """One context per paper; a question's category is the number of facts in its paper."""

    max_new_tokens = 24
    stop: tuple[str, ...] = ()
    metrics = ("exact_match", "substring_exact_match")
    drop_first = "oldest"
    writes_questions = False

    def __init__(self, name: str, settings: FactsSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        for facts in self.settings.facts:
            drawn = Generated(eval_papers=self.settings.papers, facts_per_paper=facts, seed=self.settings.seed)
            papers, _ = parse_papers(generate_papers("eval", drawn).items())
            for number, paper in enumerate(papers):
                yield self._context(paper, f"{facts}/{number}", facts)

    def _context(self, paper: Paper, context_id: str, facts: int) -> Context:
        told = [question for question in paper.questions if question.answers[0].kind == "extractive"]
        draw = random.Random(f"{self.settings.seed}/{context_id}")
        asked = draw.sample(told, min(self.settings.questions, len(told)))
        questions = [
            Question(
                question_id=f"{context_id}/{question.question_id}",
                cluster_id=context_id,
                messages=[{"role": "user", "content": question.text}],
                references=[question.answers[0].text],
                category=f"{facts} fact{'s' * (facts > 1)}",
            )
            for question in asked
        ]
        return Context(context_id, paper_messages(paper), questions)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        scores = text_scores(prediction, question.references)
        return {metric: scores[metric] for metric in self.metrics}
