"""Where the papers of a split come from: official files, the Hub, or the generator."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.config import Data
from pipelines.data.generate import Split, generate_papers
from pipelines.data.papers import BadRecord, Paper, parse_papers, read_papers
from pipelines.errors import StageError
from pipelines.run.files import file_digest

HUB_SPLITS = {"train": "train", "eval": "validation"}
HUB_PARQUET = "refs/convert/parquet"
"""The Hub's own Parquet conversion; the main branch needs a loading script, which is never run here."""


@dataclass
class Corpus:
    """Papers of a split, what could not be used, and where they came from (``origin``, kept in the manifest).

    ``renamed_questions`` lists the ids that were given to questions whose own id occurred before.
    """

    papers: list[Paper]
    bad_records: list[BadRecord]
    origin: dict[str, Any]
    renamed_questions: list[str] = field(default_factory=list)


def load_corpus(data: Data, split: Split, folder: Path) -> Corpus:
    """The papers of a split. Generated ones are written to ``folder/papers.json`` and read back from there.

    Raises StageError for a file that isn't QASPER or a Hub that can't be reached.
    """
    if data.source == "hub":
        corpus = _from_hub(data, split)
    elif data.source == "files":
        names = data.train_files if split == "train" else data.eval_files
        corpus = _from_files([Path(name) for name in names])
    else:
        path = folder / "papers.json"
        path.write_text(json.dumps(generate_papers(split, data.generated), indent=1) + "\n", encoding="utf-8")
        corpus = _from_files([path])
        corpus.origin = {
            "generated": data.generated.model_dump(),
            "sha256": corpus.origin["files"][0]["sha256"],
        }
    _make_question_ids_unique(corpus)
    return corpus


def _from_files(paths: list[Path]) -> Corpus:
    papers: list[Paper] = []
    bad_records: list[BadRecord] = []
    first_file: dict[str, Path] = {}
    files = []
    for path in paths:
        found, bad = read_papers(path)
        bad_records.extend(bad)
        for paper in found:
            if paper.paper_id in first_file:
                reason = f"{path}: its id was already used in {first_file[paper.paper_id]}"
                lost = f"; its {len(paper.questions)} questions are lost"
                bad_records.append(BadRecord("paper", paper.paper_id, None, reason + lost))
            else:
                first_file[paper.paper_id] = path
                papers.append(paper)
        files.append({"path": str(path), "sha256": file_digest(path)})
    return Corpus(papers, bad_records, {"files": files})


def _from_hub(data: Data, split: Split) -> Corpus:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    revision = data.hub_revision or HUB_PARQUET
    where = f"{data.hub_id}, revision {revision}, split {HUB_SPLITS[split]}"
    try:
        table = datasets.load_dataset(data.hub_id, revision=revision, split=HUB_SPLITS[split])
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        raise StageError(
            f"{where}: can't be loaded ({type(error).__name__}: {error}); without network, use data.source "
            "'files' with QASPER's official JSON, or 'generated'"
        ) from error
    missing = {"id", "full_text", "qas"} - set(table.column_names)
    if missing:
        raise StageError(f"{where}: not QASPER, the columns {', '.join(sorted(missing))} are missing")
    records = [(str(row["id"]), official_record(row)) for row in table]
    papers, bad = parse_papers(records)
    if not papers:
        raise StageError(f"{where}: no QASPER paper" + (f"; {bad[0].paper_id}: {bad[0].reason}" if bad else ""))
    origin = {
        "hub": data.hub_id,
        "revision": revision,
        "files": sorted(table.info.download_checksums or {}),  # addresses with the commit in them
        "sha256": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest(),
    }
    return Corpus(papers, bad, origin)


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


def _make_question_ids_unique(corpus: Corpus) -> None:
    # Scores of different models are paired by question id, so that no two questions may share one.
    seen: Counter[str] = Counter()
    for number, paper in enumerate(corpus.papers):
        questions = []
        for question in paper.questions:
            seen[question.question_id] += 1
            if (occurrence := seen[question.question_id]) > 1:
                question = replace(question, question_id=f"{question.question_id}-{occurrence}")
                corpus.renamed_questions.append(question.question_id)
            questions.append(question)
        corpus.papers[number] = replace(paper, questions=tuple(questions))
