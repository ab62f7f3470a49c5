"""SQuAD's schema (Rajpurkar et al. 2016, 2018): a passage, or the part of it that holds the answer, is written.

SQuADShifts, XQuAD and many others have the same form: ``{"data": [{title, paragraphs: [{context, qas}]}]}``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from deltamem.chat.format import sentence_spans
from pipelines.config.data import SquadSource
from pipelines.data.documents import BadRecord, Document, Exercise, Reading, Split, first_problem, hold_out, read_files
from pipelines.data.draw import pick
from pipelines.data.files import kind_of, mended, read_json
from pipelines.data.gaps import asked_for_gaps
from pipelines.data.papers import UNANSWERABLE
from pipelines.errors import StageError

EXPECTED = 'SQuAD\'s JSON, {"data": [{title, paragraphs: [{context, qas: [{id, question, answers}]}]}]}'


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _ArticleRecord(_Record):
    title: str = ""
    paragraphs: list[Any]


class _PassageRecord(_Record):
    context: str
    qas: list[Any]


class _AnswerRecord(_Record):
    text: str
    answer_start: int


class _QuestionRecord(_Record):
    id: str
    question: str
    answers: list[Any]
    is_impossible: bool = False


class _Asked(NamedTuple):
    """A usable question, and the characters of the passage that answer it; (0, 0) where nothing does."""

    exercise: Exercise
    span: tuple[int, int]


def load(settings: SquadSource, split: Split, folder: Path) -> Reading:
    """The passages, or parts of them, of a split; an article is held out as a whole."""
    own = split == "eval" and settings.eval_files
    paths = settings.eval_files if own else settings.train_files
    reading = read_files(paths, lambda path, bad: _read(path, settings, bad), EXPECTED)
    reading = reading if settings.eval_files else hold_out(reading, split, settings.eval_share)
    return asked_for_gaps(reading, settings.gaps) if split == "train" or settings.texts == "others" else reading


def _read(path: Path, settings: SquadSource, bad: list[BadRecord]) -> Iterator[Document]:
    content = read_json(path, f"expected {EXPECTED}")
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list):
        found = "an object without a list of 'data'" if isinstance(content, dict) else kind_of(content)
        raise StageError(f"{path}: the file holds {found}; expected {EXPECTED}")
    for number, record in enumerate(articles):
        record, damaged = mended(record)
        try:
            article = _ArticleRecord.model_validate(record)
        except ValidationError as error:
            bad.append(BadRecord("article", f"data.{number}", None, first_problem(error)))
            continue
        title = article.title or f"article {number}"
        if damaged:
            bad.append(BadRecord("characters", title, None, f"{damaged} lone surrogates, replaced by U+FFFD"))
        for place, passage in enumerate(article.paragraphs):
            yield from _passage(f"{title}/{place}", title, passage, settings, bad)


def _passage(passage_id: str, title: str, record: Any, settings: SquadSource, bad: list[BadRecord]) -> list[Document]:
    """The documents of one passage; what of it could not be used is added to ``bad``."""
    try:
        passage = _PassageRecord.model_validate(record)
    except ValidationError as error:
        bad.append(BadRecord("passage", passage_id, None, first_problem(error)))
        return []
    whole = settings.write == "passage"
    asked = [found for number, question in enumerate(passage.qas)
             if (found := _question(passage_id, number, question, passage.context, settings.write, bad))]  # fmt: skip
    parts = [(0, len(passage.context))] if whole else _parts(passage.context, settings.write, passage_id)
    texts = _by_part(parts, asked)
    if settings.texts == "others":
        texts = {part: [] for part in parts if not any(a < part[1] and part[0] < b for a, b in texts)}
    return [
        Document(
            document_id=passage_id if whole else f"{passage_id}/{start}",
            messages=[{"role": "user", "content": passage.context[start:end].strip()}],
            exercises=[question.exercise for question in questions],
            noun=settings.write,
            group=title,
        )
        for (start, end), questions in texts.items()
    ]


def _parts(text: str, write: str, passage_id: str) -> list[tuple[int, int]]:
    """[start, end) of a passage's sentences, or of runs of two or three of them; the last run may be shorter."""
    parts, sentences = [], sentence_spans(text)
    draw = random.Random(f"{passage_id}/windows")
    while sentences:
        size = 1 if write == "sentence" else pick(draw, (2, 3))
        parts.append((sentences[0][0], sentences[:size][-1][1]))
        sentences = sentences[size:]
    return parts


def _by_part(parts: list[tuple[int, int]], asked: list[_Asked]) -> dict[tuple[int, int], list[_Asked]]:
    """Questions by the [start, end) of the parts, one as a rule, that hold their answers."""
    found = defaultdict(list)
    for question in asked:
        first, last = question.span
        holding = [(start, end) for start, end in parts if start < last and first < end] or parts
        found[holding[0][0], holding[-1][1]].append(question)
    return dict(sorted(found.items()))


def _question(passage_id: str, number: int, record: Any, text: str, write: str, bad: list[BadRecord]) -> _Asked | None:
    question_id = record["id"] if isinstance(record, dict) and isinstance(record.get("id"), str) else f"qas.{number}"

    def lost(what: str, reason: str) -> None:
        bad.append(BadRecord(what, passage_id, question_id, reason))

    try:
        fields = _QuestionRecord.model_validate(record)
    except ValidationError as error:
        lost("question", first_problem(error))
        return None
    if not fields.question.strip():
        lost("question", "the question is empty")
        return None
    if fields.is_impossible:
        if write != "passage":
            lost("question", f"it has no answer, so no {write} holds one (write: {write})")
            return None
        return _Asked(_exercise(question_id, fields.question, [UNANSWERABLE], "unanswerable"), (0, 0))
    spans = {}
    for place, answer in enumerate(fields.answers, start=1):
        found = _locate(answer, text)
        if isinstance(found, str):
            lost("answer", f"answer {place} of {len(fields.answers)}: {found}")
        else:
            spans.setdefault(text[slice(*found)].strip(), found)
    if not spans:
        lost("question", "none of its answers is usable" if fields.answers else "it has no answers")
        return None
    return _Asked(_exercise(question_id, fields.question, list(spans), "extractive"), next(iter(spans.values())))


def _exercise(question_id: str, question: str, references: list[str], kind: str) -> Exercise:
    return Exercise(question_id, [{"role": "user", "content": question.strip()}], references, kind)


def _locate(record: Any, text: str) -> tuple[int, int] | str:
    """Where in the passage an answer stands, or why it can't be used."""
    try:
        answer = _AnswerRecord.model_validate(record)
    except ValidationError as error:
        return first_problem(error)
    if not answer.text.strip():
        return "it is empty"
    start = answer.answer_start
    if start < 0 or text[start : start + len(answer.text)] != answer.text:
        start = text.find(answer.text)  # files that were edited have their offsets wrong
    if start < 0:
        return f"{answer.text[:60]!r} isn't in the passage"
    return start, start + len(answer.text)
