"""A benchmark's questions as its data have them, made fit to be asked: every id once, and text that can be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from pipelines.benchmarks.base import Context, Question
from pipelines.data.documents import BadRecord
from pipelines.data.files import mended

_WORDS = {
    "repeated": "more than once in the data, word for word; asked once",
    "renamed": "id of different records; all but the first get a number after theirs",
    "lost": "left out",
    "mended": "half characters (lone surrogates) in the text; replaced by U+FFFD",
}


@dataclass
class Intake:
    """Contexts and questions whose ids are theirs alone, and whose text any tokenizer and file takes.

    Everything in an evaluation goes by ids: which memory a question starts from, which answers are there already, and
    which answers of two methods are compared.

    Attributes:
        contexts: what is there twice, word for word, is there once; of different records with one id all but the first
            have a number after theirs.
        repeated, renamed: the ids of which this is true.
        lost: the records that could not be used, each with the reason.
        mended: ids of contexts in whose text half a character (a lone surrogate) was replaced by U+FFFD.
    """

    contexts: list[Context] = field(default_factory=list)
    repeated: dict[str, None] = field(default_factory=dict)
    renamed: dict[str, None] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    mended: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, contexts: Sequence[Context], bad_records: Sequence[BadRecord] = ()) -> Intake:
        found = cls(lost=[f"{bad.question_id or bad.paper_id}: {bad.reason}" for bad in bad_records])
        read: dict[str, list[Context]] = {}
        context_ids: set[str] = set()
        question_ids: set[str] = set()
        for context in map(found._mend, contexts):
            twins = read.setdefault(context.context_id, [])
            if context in twins:
                found.repeated[context.context_id] = None
                continue
            twins.append(context)
            questions = list(found._questions(context.questions, question_ids))
            context_id = found._own_id(context.context_id, context_ids)
            found.contexts.append(replace(context, context_id=context_id, questions=questions))
        return found

    def _mend(self, context: Context) -> Context:
        content, damaged = mended(asdict(context))
        if not damaged:
            return context
        self.mended[content["context_id"]] = None
        return Context(**content | {"questions": [Question(**question) for question in content["questions"]]})

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

    def note(self) -> dict[str, list[str]]:
        """{what was done: ids, or words}, of what had to be done."""
        done = {"repeated": self.repeated, "renamed": self.renamed, "lost": self.lost, "mended": self.mended}
        return {what: list(ids) for what, ids in done.items() if ids}


def told(note: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What an :meth:`Intake.note` says, a sentence each."""
    for what, ids in note.items():
        shown = ", ".join(ids[:3])
        yield f"{shown if len(ids) <= 3 else f'{shown} and {len(ids) - 3} more'}: {_WORDS[what]}"
