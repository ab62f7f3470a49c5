"""What every source of data comes to: documents that are written, and exercises about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from deltamem.chat.messages import Message
from pipelines.data.files import Distinct
from pipelines.data.spool import Spool
from pipelines.errors import StageError
from pipelines.run.files import file_digest

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Exercise:
    """One reply to learn.

    Attributes:
        question_id: unique within its source.
        prompt: what is visible: chat messages, a system's first if there is one, then at least one other.
        references: accepted replies, never empty; the first is learnt.
        kind: of the reply, such as "extractive"; the source's own word.
        value: the words of the reply that tell what was asked for, if the source knows them.
        finished: whether the reply ends there; of one that was cut off, no end is learnt.
    """

    question_id: str
    prompt: list[Message]
    references: list[str]
    kind: str
    value: str = ""
    finished: bool = True


@dataclass(frozen=True)
class Document:
    """What is written to one memory, and the exercises that share it.

    Attributes:
        document_id: unique within its source.
        messages: what is written, as chat messages.
        exercises: in the order of the source.
        noun: what it is, for messages: "paper", "passage", "chat".
        group: documents of one group, such as an article's passages, are held out together; "" is a group of its own.
        drop_first: which messages go first where they are more than the budget.
        empty_memory: whether nothing is written, and that is meant; else a document without text is dropped.
    """

    document_id: str
    messages: list[Message]
    exercises: list[Exercise]
    noun: str
    group: str = ""
    drop_first: Literal["oldest", "newest"] = "newest"
    empty_memory: bool = False


@dataclass(frozen=True)
class BadRecord:
    """Something that could not be used as it is: a whole document, a question, one answer to it, or characters."""

    lost: str
    paper_id: str
    question_id: str | None
    reason: str


@dataclass
class Reading:
    """Documents of a split as they are read, one after the other and once; when all are, the rest is complete.

    Attributes:
        bad_records: what could not be used.
        origin: where the documents came from, kept in the manifest.
    """

    documents: Iterable[Document]
    bad_records: list[BadRecord]
    origin: dict[str, Any]


@dataclass
class Corpus:
    """All documents of a split, as often as is wanted, every one and every question under an id of its own.

    Attributes:
        bad_records, origin: of the reading.
        renamed_questions: the ids that were given to questions whose own id occurred before.
        renamed_documents: the same of documents.
    """

    documents: Spool[Document]
    bad_records: list[BadRecord]
    origin: dict[str, Any]
    renamed_questions: list[str]
    renamed_documents: list[str]

    @property
    def questions(self) -> int:
        """How many exercises the documents have."""
        return sum(len(document.exercises) for document in self.documents)


def read_files(paths: Iterable[str], read: Callable[[Path, list[BadRecord]], Iterable[Document]], what: str) -> Reading:
    """The documents of some files.

    Args:
        read: one file's documents, one after the other; what of it could not be used is added to the list.
        what: the files are expected to be, in words.

    Raises:
        StageError: a file gives no document.
    """
    bad_records: list[BadRecord] = []
    files = []

    def documents() -> Iterator[Document]:
        for path in map(Path, paths):
            bad: list[BadRecord] = []
            yield from at_least_one(read(path, bad), bad, path, what)
            bad_records.extend(bad)
            files.append({"path": str(path), "sha256": file_digest(path)})

    return Reading(documents(), bad_records, {"files": files})


def at_least_one(
    documents: Iterable[Document], bad: list[BadRecord], where: str | Path, what: str
) -> Iterator[Document]:
    """The documents; where there is none a StageError says so, with the first bad record and what was expected."""
    document = None
    for document in documents:
        yield document
    if document is None:
        raise StageError(f"{where}: no usable record in it ({_first_bad(bad)}); expected {what}")


def _first_bad(records: list[BadRecord]) -> str:
    if not records:
        return "it is empty"
    return f"the first of {len(records)} bad records: {records[0].paper_id}: {records[0].reason}"


def hold_out(reading: Reading, split: Split, share: float) -> Reading:
    """The part in a split of what is read, where nothing else is there to evaluate on.

    The groups whose names' digests are smallest are held out, ``share`` of them and at least one: the same ones
    whatever the order of the records. Raises StageError if there is only one group.
    """
    documents = Spool(reading.documents)
    groups = sorted({_group(document) for document in documents}, key=_digest)
    if len(groups) < 2:
        raise StageError(
            f"{reading.origin}: all {len(documents)} documents are of one record, so that none can be held out "
            "for evaluation; give eval_files"
        )
    held_out = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    part = (document for document in documents if (_group(document) in held_out) == (split == "eval"))
    return replace(reading, documents=part, origin={**reading.origin, "held_out": share})


def _group(document: Document) -> str:
    return document.group or document.document_id


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def read_whole(reading: Reading) -> Corpus:
    """What is read, with another id for every document and question whose own occurred before, which is noted.

    Scores of different models are paired by question id, and questions share a write by document id.
    """
    distinct_document, distinct_question = Distinct(), Distinct()
    questions: list[str] = []
    documents: list[str] = []

    def renamed(document: Document) -> Document:
        document_id = distinct_document(document.document_id)
        exercises = []
        for exercise in document.exercises:
            question_id = distinct_question(exercise.question_id)
            if question_id != exercise.question_id:
                questions.append(question_id)
                exercise = replace(exercise, question_id=question_id)
            exercises.append(exercise)
        if document_id != document.document_id:
            documents.append(document_id)
        return replace(document, document_id=document_id, exercises=exercises)

    spool = Spool(map(renamed, reading.documents))
    return Corpus(spool, reading.bad_records, reading.origin, questions, documents)


def with_system_prompt(reading: Reading, text: str | None) -> Reading:
    """The same with a system message in front of what is written, if anything is, and of what is read.

    None leaves it as it is, and so does a document that begins with a system message of its own.
    """
    if text is None:
        return reading
    system = {"role": "system", "content": text}
    return replace(reading, documents=(_with_system(document, system) for document in reading.documents))


def _with_system(document: Document, system: Message) -> Document:
    chats = [document.messages, *(exercise.prompt for exercise in document.exercises)]
    if any(message["role"] == "system" for chat in chats for message in chat[:1]):
        return document
    messages = [system, *document.messages] if document.messages else []
    exercises = [replace(exercise, prompt=[system, *exercise.prompt]) for exercise in document.exercises]
    return replace(document, messages=messages, exercises=exercises)


def first_problem(error: ValidationError) -> str:
    """The path and the message of a record's first problem."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    return f"{path}: {first['msg']}" if path else first["msg"]
