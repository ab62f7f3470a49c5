"""TweetQA (Xiong et al. 2019): a tweet is written, its questions are answered in free text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config.data import TweetqaSource
from pipelines.data.documents import BadRecord, Document, Exercise, Reading, Split, first_problem, hold_out, read_files
from pipelines.data.files import kind_of, mended, read_json
from pipelines.data.gaps import asked_for_gaps
from pipelines.errors import StageError

EXPECTED = "TweetQA's JSON, [{Question, Answer: [text, …], Tweet, qid}]"


class _TweetRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    Question: str
    Answer: list[str]
    Tweet: str
    qid: str


def load(settings: TweetqaSource, split: Split, folder: Path) -> Reading:
    """The tweets of a split, each once, with all its questions."""
    own = split == "eval" and settings.eval_files
    reading = read_files(settings.eval_files if own else settings.train_files, _read, EXPECTED)
    reading = reading if settings.eval_files else hold_out(reading, split, settings.eval_share)
    return asked_for_gaps(reading, settings.gaps) if split == "train" else reading


def _read(path: Path, bad: list[BadRecord]) -> list[Document]:
    records = read_json(path, f"expected {EXPECTED}")
    if not isinstance(records, list):
        raise StageError(f"{path}: the file holds {kind_of(records)}; expected {EXPECTED}")
    tweets: dict[str, list[Exercise]] = {}
    for number, record in enumerate(records):
        record, damaged = mended(record)
        found = _exercise(record)
        qid = record["qid"] if isinstance(record, dict) and isinstance(record.get("qid"), str) else f"record {number}"
        if damaged:
            bad.append(BadRecord("characters", qid, None, f"{damaged} lone surrogates, replaced by U+FFFD"))
        if isinstance(found, str):
            bad.append(BadRecord("question", qid, qid, found))
        else:
            tweets.setdefault(record["Tweet"].strip(), []).append(found)
    return [
        Document(exercises[0].question_id, [{"role": "user", "content": tweet}], exercises, "tweet")
        for tweet, exercises in tweets.items()
    ]


def _exercise(record: Any) -> Exercise | str:
    """A record's exercise, or why there is none."""
    try:
        fields = _TweetRecord.model_validate(record)
    except ValidationError as error:
        return first_problem(error)
    references = list(dict.fromkeys(answer.strip() for answer in fields.Answer if answer.strip()))
    if not references:
        return "its answers are empty" if fields.Answer else "it has no answers"
    if not fields.Question.strip() or not fields.Tweet.strip():
        return "the question is empty" if fields.Tweet.strip() else "the tweet is empty"
    return Exercise(fields.qid, [{"role": "user", "content": fields.Question.strip()}], references, "free_form")
