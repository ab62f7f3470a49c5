"""Sets of real text and of facts as benchmarks, and asking a model about them outside of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from pipelines.benchmarks import Benchmark, Context, Question, get_benchmark
from pipelines.benchmarks.answer_f1 import answer_f1
from pipelines.benchmarks.base import first_questions
from pipelines.benchmarks.hotpotqa import exact_match
from pipelines.config.benchmarks import ChatRecallSettings, ChatRepliesSettings, HotpotqaSettings, LocomoSettings
from pipelines.config.data import DataSource, QasperSource, SquadSource, TweetqaSource
from pipelines.data.documents import BadRecord
from pipelines.data.sources import load_corpus
from pipelines.evaluation.examiner import Examiner
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.evaluation.records import Record, RecordLog, write_parquet
from pipelines.evaluation.results import summarise
from pipelines.evaluation.statistics import Bootstrap

Backbone = Annotated[Path, typer.Argument(help="prepared backbone folder")]
Adapter = Annotated[str, typer.Argument(help="δ-mem adapter on it: a folder or Hub id")]
Batch = Annotated[int, typer.Option(min=1, help="questions asked at once")]
Samples = Annotated[int, typer.Option(min=1, help="bootstrap samples")]

CACHE_BYTES = {"cpu": 2 * 2**30, "cuda": 12 * 2**30}
"""Of keys and values in one batch of questions."""


class OfSource:
    """The documents that a source of data holds for evaluation, as a benchmark: answer F1 and exact match."""

    version, stop, drop_first, writes_questions = "1", (), "oldest", False
    metrics = ("f1", "exact_match")
    max_new_tokens = 16

    def __init__(self, name: str, source: DataSource) -> None:
        self.name, self.source = name, source
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        with tempfile.TemporaryDirectory() as folder:
            corpus = load_corpus(self.source, "eval", Path(folder))
        self.bad_records = corpus.bad_records
        for document in corpus.documents:
            cluster = document.group or document.document_id
            yield Context(
                document.document_id,
                document.messages,
                [Question(e.question_id, cluster, e.prompt, e.references, e.kind) for e in document.exercises],
            )

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        matches = [exact_match(prediction, reference) for reference in question.references]
        return {"f1": answer_f1(prediction, question.references), "exact_match": max(matches)}


def _squad(name: str, file: str, write: str) -> Benchmark:
    return OfSource(name, SquadSource.model_validate({"kind": "squad", "write": write} | _files(file)))


def _files(file: str) -> dict[str, list[str]]:
    return {"train_files": [file], "eval_files": [file]}


OF_FILES: dict[str, Callable[[str], Benchmark]] = {
    "sentences": lambda file: _squad("sentences", file, "sentence"),
    "passages": lambda file: _squad("passages", file, "passage"),
    "tweets": lambda file: OfSource("tweets", TweetqaSource(kind="tweetqa", **_files(file))),
    "qasper": lambda file: OfSource("qasper", QasperSource(kind="qasper", **_files(file))),
    "hotpotqa": lambda file: get_benchmark("hotpotqa", HotpotqaSettings(kind="hotpotqa", version=1, file=file)),
    "locomo": lambda file: get_benchmark("locomo", LocomoSettings(kind="locomo", version=1, file=file)),
}
"""From a set's file to its benchmark: SQuAD's form by sentence and by passage, TweetQA, QASPER, HotpotQA, LoCoMo."""

SETS: dict[str, Callable[[str], Benchmark]] = OF_FILES | {
    "chat": lambda count: get_benchmark("chat", ChatRecallSettings(kind="chat_recall", version=1, **_count(count))),
    "unseen": lambda count: get_benchmark(
        "unseen", ChatRecallSettings(kind="chat_recall", version=1, unseen=True, **_count(count))
    ),
    "replies": lambda count: get_benchmark(
        "replies", ChatRepliesSettings(kind="chat_replies", version=1, **_count(count))
    ),
}
"""With those of so many conversations (32 where no number is given): chats, chats about kinds of facts that no training
sees, and what a memory costs their replies."""


def _count(text: str) -> dict[str, int]:
    if text and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(
            f"chat, unseen and replies are followed by a number of conversations, as chat=128, not {text!r}"
        )
    return {"conversations": int(text)} if text else {}


def find_set(entry: str, sets: Mapping[str, Callable[[str], Benchmark]] = SETS) -> Benchmark:
    """The benchmark of ``NAME=FILE``, ``NAME=COUNT`` or ``NAME``.

    Raises:
        typer.BadParameter: there is no such set, no file, or no number.
    """
    name, _, file = entry.partition("=")
    if name not in sets:
        raise typer.BadParameter(f"no set of the name {name}; there are {', '.join(sets)}")
    if name in OF_FILES and not Path(file).is_file():
        raise typer.BadParameter(f"{name} is read from a file, {name}=FILE, and there is no file {file or 'named'}")
    return sets[name](file)


def some_questions(contexts: Sequence[Context], limit: int) -> list[Context]:
    """``limit`` questions of different documents as far as there are any, then of their next texts, and so on."""
    by_document: dict[str, list[Context]] = {}
    for context in contexts:
        by_document.setdefault(context.questions[0].cluster_id, []).append(context)
    in_turn = (context for texts in zip_longest(*by_document.values()) for context in texts if context is not None)
    return first_questions(list(in_turn), limit)


class How(NamedTuple):
    """How much is asked and written at once, and where records go."""

    questions: int
    batch_size: int
    out: Path
    bootstrap: Bootstrap
    write_tokens: int | None = None


def ask(
    reader: Reader,
    encoder: PromptEncoder,
    benchmark: Benchmark,
    contexts: Sequence[Context],
    conditions: Sequence[str],
    name: str,
    how: How,
) -> tuple[list[Record], dict[str, Any]]:
    """Every answer of a model to some contexts of a benchmark, and the numbers that they come to.

    Args:
        name: of the answers, which go to ``NAME.records.parquet``. Those of a run that was cut short are gone on with.
    """
    how.out.mkdir(parents=True, exist_ok=True)
    path = how.out / f"{name}.records.jsonl"
    log = RecordLog(path, {"conditions": list(conditions), "contexts": [c.context_id for c in contexts], "name": name})
    cache_bytes = CACHE_BYTES[reader.device.type]
    console = Console(stderr=True)
    Examiner(benchmark, contexts, reader, encoder, log, how.batch_size, None, cache_bytes, console).run(conditions)
    log.close()
    write_parquet(log.records, path.with_suffix(".parquet"))
    path.unlink()
    return log.records, summarise(log.records, log.costs, benchmark.metrics, how.bootstrap)


def in_columns(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The estimates of some metrics as columns of a table's row: value, low and high of each, and the questions."""
    row: dict[str, Any] = {}
    for metric, estimate in found.items():
        row |= {metric: estimate["value"], f"{metric} low": estimate["low"], f"{metric} high": estimate["high"]}
    return row | {"questions": max(estimate["n"] for estimate in found.values())}
