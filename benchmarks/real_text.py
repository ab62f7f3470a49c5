"""What an adapter remembers of real text and of chats: `python -m benchmarks.real_text --help`.

Every set is asked of the frozen backbone (none, full), of the adapter (none, state, swapped, full) and, where one is
given, of a LoRA that was trained without ever seeing a text (none): what adaptation alone buys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from benchmarks.measure import report
from deltamem import DeltaMemModel
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks import Benchmark, Context, Question, get_benchmark
from pipelines.benchmarks.answer_f1 import answer_f1
from pipelines.benchmarks.base import first_questions
from pipelines.benchmarks.hotpotqa import exact_match
from pipelines.config.benchmarks import ChatRecallSettings, HotpotqaSettings, LocomoSettings
from pipelines.config.data import DataSource, QasperSource, SquadSource, TweetqaSource
from pipelines.data.documents import BadRecord
from pipelines.data.sources import load_corpus
from pipelines.evaluation.effects import EFFECTS
from pipelines.evaluation.examiner import Examiner, reader_and_encoder
from pipelines.evaluation.records import Record, RecordLog, write_parquet
from pipelines.evaluation.results import NLL, Scores, summarise
from pipelines.evaluation.statistics import Bootstrap, paired_difference
from pipelines.strategies.lora import load_lora

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


SETS: dict[str, Callable[[str], Benchmark]] = {
    "sentences": lambda file: _squad("sentences", file, "sentence"),
    "passages": lambda file: _squad("passages", file, "passage"),
    "tweets": lambda file: OfSource("tweets", TweetqaSource(kind="tweetqa", **_files(file))),
    "qasper": lambda file: OfSource("qasper", QasperSource(kind="qasper", **_files(file))),
    "hotpotqa": lambda file: get_benchmark("hotpotqa", HotpotqaSettings(kind="hotpotqa", version=1, file=file)),
    "locomo": lambda file: get_benchmark("locomo", LocomoSettings(kind="locomo", version=1, file=file)),
    "chat": lambda _: get_benchmark("chat", ChatRecallSettings(kind="chat_recall", version=1)),
}
"""From a set's file to its benchmark: SQuAD's form by sentence and by passage, TweetQA, QASPER, HotpotQA, LoCoMo; chats
need no file."""


class Asked(NamedTuple):
    """A model and the conditions that it is asked under."""

    name: str
    model: Any
    conditions: Sequence[str]


class How(NamedTuple):
    """How much is asked at once, and where records go."""

    questions: int
    batch_size: int
    out: Path
    bootstrap: Bootstrap


def main(
    backbone: Annotated[Path, typer.Argument(help="prepared backbone folder")],
    adapter: Annotated[str, typer.Argument(help="δ-mem adapter on it: a folder or Hub id")],
    sets: Annotated[list[str], typer.Argument(help=f"NAME=FILE, or chat; names: {', '.join(SETS)}")],
    lora: Annotated[
        Path | None, typer.Option(help="a LoRA trained without any text, as lora_without_context is")
    ] = None,
    questions: Annotated[
        int, typer.Option(help="of each set, at most: the first of every text, then the second, …")
    ] = 400,
    batch_size: int = 64,
    samples: Annotated[int, typer.Option(help="bootstrap samples")] = 2000,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="folder for the numbers and for every answer")] = Path("results/real_text"),
) -> None:
    """Answers under the controlled conditions, with intervals clustered by document."""
    named = [(name, file) for name, _, file in (entry.partition("=") for entry in sets)]
    if unknown := [name for name, _ in named if name not in SETS]:
        raise typer.BadParameter(f"no set of the name {', '.join(unknown)}; there are {', '.join(SETS)}")
    out.mkdir(parents=True, exist_ok=True)
    how = How(questions, batch_size, out, Bootstrap(samples))
    rows = _rows(backbone, adapter, lora, [SETS[name](file) for name, file in named], torch.device(device), how)
    report(rows, f"{Path(adapter).name} on real text", torch.device(device), out / "rows.json")


def _rows(
    backbone: Path, adapter: str, lora: Path | None, benchmarks: Sequence[Benchmark], device: torch.device, how: How
) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_backbone(backbone, device=device)
    contexts = {benchmark.name: first_questions(list(benchmark.contexts()), how.questions) for benchmark in benchmarks}
    states: dict[str, list[Record]] = {}
    for asked in _models(base, adapter, lora):
        for benchmark in benchmarks:
            records, numbers = _ask(asked, tokenizer, benchmark, contexts[benchmark.name], how)
            yield from _told(benchmark, asked.name, numbers)
            if asked.name == "adapter":
                states[benchmark.name] = records
            elif asked.name == "lora":
                yield _against(benchmark, states[benchmark.name], records, how)


def _models(base: Any, adapter: str, lora: Path | None) -> Iterator[Asked]:
    """The models one after the other, all on the same backbone."""
    yield Asked("frozen", base, ["none", "full"])
    model = DeltaMemModel.from_pretrained(base, adapter)
    yield Asked("adapter", model, ["none", "state", "swapped", "full"])
    model.unload()
    if lora is not None:
        yield Asked("lora", load_lora(base, lora), ["none"])


def _ask(
    asked: Asked, tokenizer: Any, benchmark: Benchmark, contexts: Sequence[Context], how: How
) -> tuple[list[Record], dict[str, Any]]:
    """Every answer of a model on a set, and the numbers that they come to."""
    parts = reader_and_encoder(asked.model, tokenizer, contexts[0].questions[0])
    path = how.out / f"{benchmark.name}-{asked.name}.records.jsonl"
    key = {"conditions": list(asked.conditions), "questions": how.questions, "adapter": asked.name}
    log = RecordLog(path, key)
    cache_bytes = CACHE_BYTES[asked.model.device.type]
    Examiner(benchmark, contexts, *parts, log, how.batch_size, None, cache_bytes, Console(stderr=True)).run(
        asked.conditions
    )
    log.close()
    write_parquet(log.records, path.with_suffix(".parquet"))
    path.unlink()
    return log.records, summarise(log.records, log.costs, benchmark.metrics, how.bootstrap)


def _told(benchmark: Benchmark, model: str, numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per condition and per effect."""
    shown = [NLL, *benchmark.metrics]
    for condition, found in numbers["conditions"].items():
        yield _row(benchmark.name, model, condition, {metric: found[metric] for metric in shown if metric in found})
    for effect in EFFECTS:
        found = {m: numbers["effects"][f"{effect}_{m}"] for m in shown if f"{effect}_{m}" in numbers["effects"]}
        if found:
            yield _row(benchmark.name, model, effect.replace("_", " "), found)


def _against(benchmark: Benchmark, states: list[Record], lora: list[Record], how: How) -> dict[str, Any]:
    """What the right state is worth over the LoRA, question by question."""
    found = {}
    for metric in (NLL, *benchmark.metrics):
        ours, theirs = (Scores(records).gains(metric) for records in (states, lora))
        clusters = Scores(states).clusters(ours.index)
        gain = paired_difference(ours["state"], theirs["none"].reindex(ours.index), clusters, how.bootstrap)
        found[metric] = gain.to_dict()
    return _row(benchmark.name, "adapter", "state − lora", found)


def _row(name: str, model: str, what: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name, "model": model, "what": what}
    for metric, estimate in found.items():
        row |= {metric: estimate["value"], f"{metric} low": estimate["low"], f"{metric} high": estimate["high"]}
    return row | {"questions": max(estimate["n"] for estimate in found.values())}


if __name__ == "__main__":
    typer.run(main)
