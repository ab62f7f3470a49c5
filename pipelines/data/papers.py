"""QASPER's official JSON, read and checked record by record.

The form is that of QASPER v0.3 (Dasigi et al. 2021, "A Dataset of Information-Seeking Questions and Answers
Anchored in Research Papers"): one object ``{paper id: {title, abstract, full_text, qas}}``. A file that
isn't of this form raises StageError; a single bad record is reported and the rest of its paper is kept
where possible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

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


@dataclass(frozen=True)
class BadRecord:
    """Something that could not be used: a whole paper, a question, or one annotator's answer to it."""

    lost: Literal["paper", "question", "answer"]
    paper_id: str
    question_id: str | None
    reason: str


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


def read_papers(path: Path) -> tuple[list[Paper], list[BadRecord]]:
    """Papers of one official JSON file in file order, and what of it could not be used.

    Raises StageError, with the position, if the file can't be read, isn't JSON, or holds no QASPER paper.
    """
    records = _read_json(path)
    if not isinstance(records, dict):
        raise StageError(f"{path}, line 1: the file holds {_kind(records)} at its top; {EXPECTED}")
    papers, bad = parse_papers(records.items())
    if not papers:
        found = f'at ["{bad[0].paper_id}"]: {bad[0].reason}' if bad else "line 1: the object is empty"
        raise StageError(f"{path}, {found}; {EXPECTED}")
    return papers, bad


def parse_papers(records: Iterable[tuple[str, Any]]) -> tuple[list[Paper], list[BadRecord]]:
    """Papers from (paper id, official record) pairs, in order, and what of them could not be used."""
    papers: list[Paper] = []
    bad: list[BadRecord] = []
    for paper_id, record in records:
        try:
            fields = _PaperRecord.model_validate(record)
        except ValidationError as error:
            questions = record.get("qas") if isinstance(record, Mapping) else None
            lost = f"; its {len(questions)} questions are lost" if isinstance(questions, list) else ""
            bad.append(BadRecord("paper", paper_id, None, _reason(error) + lost))
            continue
        questions, bad_questions = _parse_questions(paper_id, fields.qas)
        bad.extend(bad_questions)
        sections = tuple(Section(s.section_name, tuple(s.paragraphs)) for s in fields.full_text)
        papers.append(Paper(paper_id, fields.title, fields.abstract, sections, questions))
    return papers, bad


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
            bad.append(BadRecord("question", paper_id, question_id, _reason(error)))
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
        return _reason(error)
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


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise StageError(f"{path}: can't be read ({error.strerror}); {EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}, byte {error.start}: not UTF-8 text; {EXPECTED}") from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "the file seems to be cut off; fetch it again" if cut_off else EXPECTED
        raise StageError(f"{where}: not JSON ({error.msg}); {hint}") from None
    except RecursionError:
        raise StageError(f"{path}: nested too deeply to be QASPER; {EXPECTED}") from None
    except _RepeatedKey as error:
        raise StageError(f"{path}: the key {error} appears twice in one object; {EXPECTED}") from None


class _RepeatedKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The json module keeps the last of equal keys and says nothing; here that would lose a paper in silence.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(repr(key) for key in keys if keys.count(key) > 1))
    return result


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    return f"{path}: {first['msg']}" if path else first["msg"]


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
