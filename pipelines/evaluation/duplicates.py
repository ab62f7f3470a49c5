"""Records that are in a benchmark's data more than once, and different ones that share an id."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pipelines.benchmarks.base import Context, Question


@dataclass
class Distinct:
    """Contexts and questions whose ids are theirs alone.

    Everything in an evaluation goes by ids: which memory a question starts from, which answers are there already, and
    which answers of two methods are compared.

    Attributes:
        contexts: what is there twice, word for word, is there once; of different records with one id all but the first
            have a number after theirs.
        repeated, renamed: the ids of which this is true.
    """

    contexts: list[Context] = field(default_factory=list)
    repeated: dict[str, None] = field(default_factory=dict)
    renamed: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, contexts: Sequence[Context]) -> Distinct:
        found = cls()
        read: dict[str, list[Context]] = {}
        context_ids: set[str] = set()
        question_ids: set[str] = set()
        for context in contexts:
            twins = read.setdefault(context.context_id, [])
            if context in twins:
                found.repeated[context.context_id] = None
                continue
            twins.append(context)
            questions = list(found._questions(context.questions, question_ids))
            context_id = found._own_id(context.context_id, context_ids)
            found.contexts.append(replace(context, context_id=context_id, questions=questions))
        return found

    def _questions(self, questions: Sequence[Question], taken: set[str]) -> Iterator[Question]:
        for number, question in enumerate(questions):
            if question in questions[:number]:
                self.repeated[question.question_id] = None
            else:
                yield replace(question, question_id=self._own_id(question.question_id, taken))

    def _own_id(self, wanted: str, taken: set[str]) -> str:
        own, number = wanted, 1
        while own in taken:
            self.renamed[wanted] = None
            number += 1
            own = f"{wanted}#{number}"
        taken.add(own)
        return own

    def told(self) -> Iterator[str]:
        """What was done, a sentence each; nothing where all ids were distinct."""
        if self.repeated:
            yield f"{_some(self.repeated)}: more than once in the data, word for word; asked once"
        if self.renamed:
            yield f"{_some(self.renamed)}: id of different records; all but the first get a number after theirs"


def _some(ids: dict[str, None]) -> str:
    shown = ", ".join(list(ids)[:3])
    return shown if len(ids) <= 3 else f"{shown} and {len(ids) - 3} more"
