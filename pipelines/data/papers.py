"""QASPER's official JSON, read and checked record by record.

The form is that of QASPER v0.3 (Dasigi et al. 2021, "A Dataset of Information-Seeking Questions and Answers
Anchored in Research Papers"): one object ``{paper id: {title, abstract, full_text, qas}}``. A file that
isn't of this form raises StageError; a single bad record is reported and the rest of its paper is kept
where possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from deltamem.chat.messages import Message
from pipelines.data.documents import BadRecord, Document, Exercise, first_problem
from pipelines.data.files import json_members, mended
from pipelines.errors import StageError

UNANSWERABLE = "Unanswerable"
EXPECTED = "expected QASPER's official JSON, one object {paper id: {title, abstract, full_text, qas}}"

AnswerKind = Literal["extractive", "free_form", "yes_no", "unanswerable"]


@dataclass(frozen=True)
class Answer:
    """One annotator's answer as text, never empty, and the field it came from."""

    text: str
    kind: AnswerKind


@dataclass(frozen=True)
class PaperQuestion:
    """A question with the usable answers in file order; there is at least one."""

    question_id: str
    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Section:
    """A section; its name may be empty."""

    name: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Paper:
    """A paper with its usable questions; title and abstract may be empty."""

    paper_id: str
    title: str
    abstract: str
    sections: tuple[Section, ...]
    questions: tuple[PaperQuestion, ...]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


# Some papers have sections without a name, which the official files write as null.
_Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class _SectionRecord(_Record):
    section_name: _Text = ""
    paragraphs: list[str]


class _PaperRecord(_Record):
    title: _Text = ""
    abstract: _Text = ""
    full_text: list[_SectionRecord]
    qas: list[Any]


class _QuestionRecord(_Record):
    question: str
    question_id: str
    answers: list[Any]


class _AnswerFields(_Record):
    unanswerable: bool = False
    extractive_spans: list[str] = []
    free_form_answer: str = ""
    yes_no: bool | None = None


class _AnnotationRecord(_Record):
    answer: _AnswerFields


def read_papers(path: Path, bad: list[BadRecord]) -> Iterator[Paper]:
    """Papers of one official JSON file in file order; what of it could not be used is added to ``bad``.

    Raises StageError, with the position, if the file can't be read, isn't JSON, or holds no QASPER paper.
    """
    paper = None
    for paper in each_paper(json_members(path, EXPECTED), bad):
        yield paper
    if paper is None:
        found = f'at ["{bad[0].paper_id}"]: {bad[0].reason}' if bad else "line 1: the object is empty"
        raise StageError(f"{path}, {found}; {EXPECTED}")


def parse_papers(records: Iterable[tuple[str, Any]]) -> tuple[list[Paper], list[BadRecord]]:
    """Papers from (paper id, official record) pairs, in order, and what of them could not be used."""
    bad: list[BadRecord] = []
    return list(each_paper(records, bad)), bad


def each_paper(records: Iterable[tuple[str, Any]], bad: list[BadRecord]) -> Iterator[Paper]:
    """The same one by one; what could not be used is added to ``bad``."""
    for paper_id, record in records:
        (paper_id, record), damaged = mended([paper_id, record])
        if damaged:
            bad.append(BadRecord("characters", paper_id, None, f"{damaged} lone surrogates, replaced by U+FFFD"))
        try:
            fields = _PaperRecord.model_validate(record)
        except ValidationError as error:
            questions = record.get("qas") if isinstance(record, Mapping) else None
            lost = f"; its {len(questions)} questions are lost" if isinstance(questions, list) else ""
            bad.append(BadRecord("paper", paper_id, None, first_problem(error) + lost))
            continue
        questions, bad_questions = _parse_questions(paper_id, fields.qas)
        bad.extend(bad_questions)
        sections = tuple(Section(s.section_name, tuple(s.paragraphs)) for s in fields.full_text)
        yield Paper(paper_id, fields.title, fields.abstract, sections, questions)


def _parse_questions(paper_id: str, records: list[Any]) -> tuple[tuple[PaperQuestion, ...], list[BadRecord]]:
    questions = []
    bad = []
    for index, record in enumerate(records):
        question_id = f"qas.{index}"
        if isinstance(record, Mapping) and isinstance(record.get("question_id"), str):
            question_id = record["question_id"]
        try:
            fields = _QuestionRecord.model_validate(record)
        except ValidationError as error:
            bad.append(BadRecord("question", paper_id, question_id, first_problem(error)))
            continue
        if not fields.question.strip():
            bad.append(BadRecord("question", paper_id, question_id, "the question is empty"))
            continue
        answers = []
        for number, annotation in enumerate(fields.answers, start=1):
            answer = _parse_answer(annotation)
            if isinstance(answer, Answer):
                answers.append(answer)
            else:
                reason = f"answer {number} of {len(fields.answers)}: {answer}"
                bad.append(BadRecord("answer", paper_id, question_id, reason))
        if answers:
            questions.append(PaperQuestion(question_id, fields.question.strip(), tuple(answers)))
        else:
            reason = "none of its answers is usable" if fields.answers else "it has no answers"
            bad.append(BadRecord("question", paper_id, question_id, reason))
    return tuple(questions), bad


def _parse_answer(annotation: Any) -> Answer | str:
    """The answer, or the reason why there is none. The order of the fields is that of QASPER's evaluator."""
    try:
        fields = _AnnotationRecord.model_validate(annotation).answer
    except ValidationError as error:
        return first_problem(error)
    spans = ", ".join(span.strip() for span in fields.extractive_spans if span.strip())
    free_form = fields.free_form_answer.strip()
    if fields.unanswerable:
        return Answer(UNANSWERABLE, "unanswerable")
    if spans:
        return Answer(spans, "extractive")
    if free_form:
        return Answer(free_form, "free_form")
    if fields.yes_no is not None:
        return Answer("Yes" if fields.yes_no else "No", "yes_no")
    return "all of its fields are empty"


def paper_document(paper: Paper) -> Document:
    """A paper as what is written, and its questions as what is asked of it.

    Where annotators disagree, the first usable answer in file order is the one to learn: that needs no judgement and is
    the same everywhere. Scoring compares with all of them.
    """
    exercises = [
        Exercise(
            question_id=question.question_id,
            prompt=[{"role": "user", "content": question.text}],
            references=[answer.text for answer in question.answers],
            kind=question.answers[0].kind,
        )
        for question in paper.questions
    ]
    return Document(paper.paper_id, paper_messages(paper), exercises, "paper")


def paper_messages(paper: Paper) -> list[Message]:
    """The paper as user messages: title with abstract, then each section; what has no text is left out."""
    parts: list[tuple[str, Sequence[str]]] = []
    if (paper.title + paper.abstract).strip():
        parts.append((paper.title, [paper.abstract]))
    parts += [
        (section.name, section.paragraphs)
        for section in paper.sections
        if any(paragraph.strip() for paragraph in section.paragraphs)
    ]
    return [
        {"role": "user", "content": "\n".join(line.strip() for line in (head, *body) if line.strip())}
        for head, body in parts
    ]
