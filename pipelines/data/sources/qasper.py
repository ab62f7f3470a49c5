"""QASPER: papers from official files or the Hub; a paper is written, its questions are asked one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config.data import QasperSource
from pipelines.data.chunks import cut_text
from pipelines.data.documents import BadRecord, Document, Reading, Split, at_least_one, hold_out, read_files
from pipelines.data.files import from_hub, hub_origin
from pipelines.data.papers import EXPECTED, UNANSWERABLE, each_paper, paper_document, read_papers
from pipelines.errors import StageError

HUB_SPLITS = {"train": "train", "eval": "validation"}
HUB_PARQUET = "refs/convert/parquet"
"""The Hub's own Parquet conversion; the main branch needs a loading script, which is never run here."""


RELEASE_SYSTEM = (
    "Answer the question from the notes that you were given earlier. If they don't contain the answer, reply exactly: "
    "No information available."
)
RELEASE_UNANSWERABLE = "No information available."
RELEASE_TURN_CHARACTERS = 1_000
"""Of a numbered turn at most, cut after paragraphs: ten whole papers have 17 to 68 turns, 35 in the middle; in the
release's set they have 23 to 34."""


def load(settings: QasperSource, split: Split, folder: Path) -> Reading:
    """The papers of a split."""
    reading = _load(settings, split)
    if settings.form == "release":
        reading.documents = map(in_release_form, reading.documents)
    return reading


def in_release_form(document: Document) -> Document:
    """A paper as δ-mem's public release trains on it: its whole text is one message of numbered turns.

    What is written and what is read begin with a system message, and a question that the paper doesn't answer is
    answered in the words that this one gives.
    """
    text = "\n\n".join(message["content"] for message in document.messages)
    turns = [f"Turn {number}:\n{turn}" for number, turn in enumerate(cut_text(text, RELEASE_TURN_CHARACTERS), start=1)]
    system = {"role": "system", "content": RELEASE_SYSTEM}
    exercises = [
        replace(
            exercise,
            prompt=[system, *exercise.prompt],
            references=[RELEASE_UNANSWERABLE if r == UNANSWERABLE else r for r in exercise.references],
        )
        for exercise in document.exercises
    ]
    written = [system, {"role": "user", "content": "\n\n".join(turns)}] if turns else []
    return replace(document, messages=written, exercises=exercises)


def _load(settings: QasperSource, split: Split) -> Reading:
    if not settings.train_files:
        return _from_hub(settings, split)
    own = split == "eval" and settings.eval_files
    reading = from_files(settings.eval_files if own else settings.train_files)
    return reading if settings.eval_files else hold_out(reading, split, settings.eval_share)


def from_files(paths: list[str]) -> Reading:
    """The papers of official files; one whose id was used in an earlier file is lost."""
    first_file: dict[str, Path] = {}

    def read(path: Path, bad: list[BadRecord]) -> Iterator[Document]:
        for paper in read_papers(path, bad):
            if paper.paper_id in first_file:
                reason = f"{path}: its id was already used in {first_file[paper.paper_id]}"
                lost = f"; its {len(paper.questions)} questions are lost"
                bad.append(BadRecord("paper", paper.paper_id, None, reason + lost))
            else:
                first_file[paper.paper_id] = path
                yield paper_document(paper)

    return read_files(paths, read, EXPECTED)


def _from_hub(settings: QasperSource, split: Split) -> Reading:
    import datasets

    revision = settings.hub_revision or HUB_PARQUET
    where = f"{settings.hub_id}, revision {revision}, split {HUB_SPLITS[split]}"
    table = from_hub(
        where,
        "use QASPER's official JSON files (data.source 'files'), or 'generated' papers",
        lambda: datasets.load_dataset(settings.hub_id, revision=revision, split=HUB_SPLITS[split]),
    )
    missing = {"id", "full_text", "qas"} - set(table.column_names)
    if missing:
        raise StageError(f"{where}: not QASPER, the columns {', '.join(sorted(missing))} are missing")
    records = [(str(row["id"]), official_record(row)) for row in table]
    bad: list[BadRecord] = []
    documents = at_least_one(map(paper_document, each_paper(records, bad)), bad, where, "QASPER's papers")
    return Reading(documents, bad, hub_origin(settings.hub_id, revision, table, records))


def official_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """The official form of a Hub row, whose lists of objects are stored as objects of equally long lists."""
    questions = [
        question | {"answers": _rows(question.get("answers"))} if isinstance(question, dict) else question
        for question in _rows(row["qas"])
    ]
    return {**row, "full_text": _rows(row["full_text"]), "qas": questions}


def _rows(columns: Any) -> Any:
    # Anything else than lists of one length is left as it is, for the schema to report.
    if not isinstance(columns, Mapping) or not all(isinstance(values, list) for values in columns.values()):
        return columns
    if len({len(values) for values in columns.values()}) > 1:
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
