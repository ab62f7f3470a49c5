"""Evaluates one adapter, or the frozen backbone, on one benchmark under controlled conditions.

    python -m pipelines.evaluate --config configs/quickstart.yaml --backbone NAME --strategy tsw --seed 42 \
        --benchmark qasper

The conditions are described in ``pipelines.evaluation``. With ``--by-layer`` the state of one layer at a time is
another history's, which tells where the memory sits. Strategy ``frozen`` is the backbone alone. An
interrupted job goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from pipelines.benchmarks import Context, get_benchmark
from pipelines.benchmarks.base import first_questions
from pipelines.config import FROZEN, Config, load_config
from pipelines.config.benchmarks import BenchmarkSettings
from pipelines.config.conditions import condition, one_layer_swapped
from pipelines.errors import StageError, run_stage
from pipelines.evaluation.effects import layer_effects
from pipelines.evaluation.exam import Exam
from pipelines.evaluation.examiner import Examiner, reader_and_encoder
from pipelines.evaluation.intake import Intake, told
from pipelines.evaluation.own_replies import with_own_replies
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.records import Record, RecordLog, write_parquet
from pipelines.evaluation.results import NLL, Scores, summarise
from pipelines.evaluation.sampling import RELEASE, Sampling
from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.swap import unrelated_corpus
from pipelines.run import parts
from pipelines.run.files import alone, room_to_write
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance
from pipelines.strategies.kinds import context_transform
from pipelines.strategies.models import load_model
from pipelines.strategies.summaries import Summaries

CACHE_BYTES = 2 * 2**30
"""Of keys and values in one batch of questions on a CPU."""
CACHE_SHARE = 1 / 6
"""The same on a GPU, as a share of the memory that the job may take."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


class Answers(NamedTuple):
    """What a benchmark was answered."""

    records: list[Record]
    metrics: Sequence[str]
    notes: dict[str, Any]
    """What goes into the result besides."""


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Configuration file.")],
    backbone: Annotated[str, typer.Option(help="Name of one of its backbones.")],
    strategy: Annotated[str, typer.Option(help="Name of one of its strategies, or 'frozen'.")],
    benchmark: Annotated[str, typer.Option(help="Name of one of its benchmarks.")],
    seed: Annotated[int, typer.Option(help="Seed of the adapter's training.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask so many questions only; the result lies apart from a whole one."),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option(help="Swap the state of one layer at a time; result and picture lie apart, BENCHMARK-layers."),
    ] = False,
) -> None:
    """Evaluate one adapter of a configuration on one benchmark."""
    settings = load_config(config)
    result = evaluate(settings, backbone, strategy, seed, benchmark, limit, by_layer)
    console.print_json(data={part: result[part] for part in ("conditions", "effects")})


def evaluate(
    config: Config,
    backbone: str,
    strategy: str,
    seed: int,
    benchmark: str,
    limit: int | None = None,
    by_layer: bool = False,
) -> dict[str, Any]:
    """Writes ``<benchmark>.json`` and ``<benchmark>.records.parquet``, and returns what the former holds.

    Raises StageError where backbone, adapter or data are missing or damaged, the GPU asked for isn't there, or
    another process is evaluating the same.
    """
    config.entry("backbones", backbone)
    entry = config.entry("benchmarks", benchmark)
    exam = Exam(config, backbone, strategy, seed, benchmark, limit, by_layer)
    answer = _answer_task if entry.kind == "lm_eval" else _answer_benchmark
    with alone(exam.result.with_suffix(".lock")), room_to_write(exam.result.parent):
        log, answers = answer(exam)
        log.close()
        write_parquet(answers.records, exam.records)
        how = Bootstrap(config.evaluate.bootstrap_samples, config.evaluate.seed)
        result = {
            "benchmark": exam.name,
            "version": str(entry.version),
            "backbone": backbone,
            "strategy": strategy,
            "seed": seed,
            **summarise(answers.records, log.costs, answers.metrics, how),
            **answers.notes,
            **(_by_layer(exam, answers.records, how) if by_layer else {}),
            "provenance": provenance(parts.evaluate(config, strategy, benchmark)) | {"inputs": log.key},
        }
        exam.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        log.path.unlink()
    return result


def _answer_benchmark(exam: Exam) -> tuple[RecordLog, Answers]:
    """A benchmark of contexts and questions, under the configuration's conditions."""
    config, how = exam.config, exam.config.evaluate
    benchmark = get_benchmark(
        exam.benchmark, config.entry("benchmarks", exam.benchmark), Layout(config).data(exam.backbone, "eval")
    )
    intake = Intake.of(list(benchmark.contexts()), benchmark.bad_records)
    for sentence in told(intake.note()):
        console.print(f"{exam.benchmark}: {sentence}")
    contexts = intake.contexts
    if exam.limit is not None:
        contexts = first_questions(contexts, exam.limit)
    contexts = _with_own_replies(exam, contexts, benchmark.max_new_tokens)
    model, tokenizer, digests = load_model(config, exam.backbone, exam.strategy, exam.seed)
    reader, encoder = reader_and_encoder(model, tokenizer, contexts[0].questions[0], how.write_tokens)
    conditions = _conditions(exam, reader)
    costs = []
    strategy = config.strategies.get(exam.strategy)
    if strategy is not None and not strategy.trained:
        conditions = ["full"]
        with reader.cost(strategy.kind) as cost:
            transform = context_transform(strategy, Summaries(reader, encoder, how.batch_size), str(reader.device))
            contexts = [short for context in contexts for short in transform(context)]
        costs.append(cost)
    digests["contexts"] = _contexts_digest(contexts)
    if any(condition(name).written_from == "corpus" for name in conditions):
        digests["corpus"] = hashlib.sha256(unrelated_corpus().encode()).hexdigest()
    settings: dict[str, Any] = {"dtype": str(model.dtype), "window": encoder.window}
    settings |= {"max_new_tokens": how.max_new_tokens}
    sampling = _sampling(config.entry("benchmarks", exam.benchmark))
    settings |= {"sampling": sampling._asdict()} if sampling else {}
    log = exam.log(settings, digests, console)
    if not log.costs:  # an earlier run has logged what the transform cost it
        for cost in costs:
            log.add([], cost)
    limits = how.batch_size, how.max_new_tokens, _cache_bytes(reader.device, how.gpus)
    Examiner(benchmark, contexts, reader, encoder, log, *limits, console, sampling).run(conditions)
    note = intake.note()
    return log, Answers(log.records, benchmark.metrics, {"records": note} if note else {})


def _conditions(exam: Exam, reader: Reader) -> list[str]:
    """The conditions that the model is asked under."""
    named = exam.config.evaluate.conditions
    if exam.by_layer:
        memory = reader.start(1).memory if reader.has_memory else None
        if memory is None:
            raise StageError(f"--by-layer: {exam.strategy} has no memory, and so no layer whose state could be swapped")
        return ["state", "swapped", *map(one_layer_swapped, memory.states)]
    if not reader.has_memory:
        return [name for name in named if not condition(name).needs_memory] or ["none"]
    return list(named)


def _by_layer(exam: Exam, records: Sequence[Record], how: Bootstrap) -> dict[str, Any]:
    """The effect of every layer's state on the answers' NLL; draws its picture."""
    from pipelines.reporting.charts import write_by_layer  # of all evaluations few draw

    gains = (scores := Scores(records)).gains(NLL)
    columns = {str(name): column.to_numpy() for name, column in gains.items()}
    found = layer_effects(columns, scores.clusters(gains.index), how)
    write_by_layer(found, "NLL, one layer swapped − state", exam.picture)
    return {"layers": {str(layer): estimate.to_dict() for layer, estimate in found.items()}}


def _with_own_replies(exam: Exam, contexts: list[Context], limit: int) -> list[Context]:
    """The contexts; questions without references get the frozen backbone's own replies."""
    if all(question.references for context in contexts for question in context.questions):
        return contexts
    model, tokenizer, _ = load_model(exam.config, exam.backbone, FROZEN, 0)
    reader, encoder = reader_and_encoder(model, tokenizer, contexts[0].questions[0])
    return with_own_replies(contexts, reader, encoder, limit, exam.config.evaluate.batch_size)


def _sampling(entry: BenchmarkSettings) -> Sampling | None:
    """How a benchmark's answers are drawn; None: they are greedy."""
    return RELEASE if getattr(entry, "draws", False) else None


def _cache_bytes(device: torch.device, gpus: float) -> int:
    """Room for the keys and values of one batch of questions."""
    if device.type != "cuda":
        return CACHE_BYTES
    return int(torch.cuda.mem_get_info(device)[1] * min(1.0, gpus) * CACHE_SHARE)


def _answer_task(exam: Exam) -> tuple[RecordLog, Answers]:
    """A task of lm-evaluation-harness, which has no history and one condition, ``full``."""
    from pipelines.harness.tasks import run_lm_eval

    config, entry = exam.config, exam.config.entry("benchmarks", exam.benchmark)
    if exam.limit is not None:
        entry = entry.model_copy(update={"max_questions": exam.limit})
    model, tokenizer, digests = load_model(config, exam.backbone, exam.strategy, exam.seed)
    log = exam.log({"dtype": str(model.dtype), "entry": entry.model_dump(mode="json")}, digests, console)
    records, harness = run_lm_eval(model, tokenizer, entry, config.evaluate.batch_size, log, console, _sampling(entry))
    return log, Answers(records, entry.metrics, {"harness": harness})


def _contexts_digest(contexts: Sequence[Context]) -> str:
    """sha256 (hex) over all histories, questions and references, in their order."""
    total = hashlib.sha256()
    for context in contexts:
        total.update(json.dumps(asdict(context), sort_keys=True, ensure_ascii=False, default=str).encode())
    return total.hexdigest()


if __name__ == "__main__":
    run_stage(app)
