"""Evaluates one adapter, or the frozen backbone, on one benchmark under controlled conditions.

    python -m pipelines.evaluate --config configs/quickstart.yaml --backbone NAME --strategy tsw --seed 42 \
        --benchmark qasper

The conditions are described in ``pipelines.evaluation``. Strategy ``frozen`` is the backbone alone. An
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
from pipelines.config import Config, load_config
from pipelines.errors import run_stage
from pipelines.evaluation.examiner import Engine, reader_and_encoder
from pipelines.evaluation.records import Record, RecordLog, write_parquet
from pipelines.evaluation.results import summarise
from pipelines.evaluation.statistics import Bootstrap
from pipelines.run import parts
from pipelines.run.files import room_to_write
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance
from pipelines.strategies.kinds import context_transform
from pipelines.strategies.models import load_model
from pipelines.strategies.summaries import Summaries

CONDITIONS_WITHOUT_MEMORY = ("none", "full")
"""The conditions of a model that has no memory."""

CACHE_BYTES = 2 * 2**30
"""Of keys and values in one batch of questions on a CPU."""
CACHE_SHARE = 1 / 6
"""The same on a GPU, as a share of the memory that the job may take."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


class Cell(NamedTuple):
    """What is evaluated, and where its result lies; ``limit``: on so many questions only."""

    config: Config
    backbone: str
    strategy: str
    seed: int
    benchmark: str
    limit: int | None

    @property
    def name(self) -> str:
        """Of the result's files; a limited result lies apart from a whole one."""
        return self.benchmark if self.limit is None else f"{self.benchmark}-first{self.limit}"

    @property
    def output(self) -> Path:
        return Layout(self.config).evaluation(self.backbone, self.strategy, self.seed, self.name)

    def log(self, settings: dict[str, Any], digests: dict[str, str | None]) -> RecordLog:
        """The log of answers so far, which tells by its key whether they are answers to what is asked now."""
        entry = self.config.entry("benchmarks", self.benchmark)
        key = {
            "benchmark": {"name": self.benchmark, "version": str(entry.version)},
            "settings": settings,
            "digests": digests,
        }
        log = RecordLog(self.output.with_suffix(".records.jsonl"), key)
        if log.records:
            console.print(f"going on after {len(log.records)} answers of an earlier run")
        if log.set_aside:
            console.print(
                "an earlier run answered something else (another model, data or settings): starting over; "
                f"its answers are in {log.set_aside}"
            )
        return log


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
) -> None:
    """Evaluate one adapter of a configuration on one benchmark."""
    settings = load_config(config)
    result = evaluate(settings, backbone, strategy, seed, benchmark, limit)
    console.print_json(data={part: result[part] for part in ("conditions", "effects")})


def evaluate(
    config: Config, backbone: str, strategy: str, seed: int, benchmark: str, limit: int | None = None
) -> dict[str, Any]:
    """Writes ``<benchmark>.json`` and ``<benchmark>.records.parquet``, and returns what the former holds.

    Raises StageError where backbone, adapter or data are missing or damaged, or the GPU asked for isn't
    there.
    """
    cell = Cell(config, backbone, strategy, seed, benchmark, limit)
    entry = config.entry("benchmarks", benchmark)
    answer = _answer_task if entry.kind == "lm_eval" else _answer_benchmark
    with room_to_write(cell.output.parent):
        log, answers = answer(cell)
        log.close()
        write_parquet(answers.records, Layout(config).records(backbone, strategy, seed, cell.name))
        how = Bootstrap(config.evaluate.bootstrap_samples, config.evaluate.seed)
        result = {
            "benchmark": cell.name,
            "version": str(entry.version),
            "backbone": backbone,
            "strategy": strategy,
            "seed": seed,
            **summarise(answers.records, log.costs, answers.metrics, how),
            **answers.notes,
            "provenance": provenance(parts.evaluate(config, strategy, benchmark)) | {"inputs": log.key},
        }
        cell.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        log.path.unlink()
    return result


def _answer_benchmark(cell: Cell) -> tuple[RecordLog, Answers]:
    """A benchmark of contexts and questions, under the configuration's conditions."""
    how, entry = cell.config.evaluate, cell.config.entry("benchmarks", cell.benchmark)
    episodes = Layout(cell.config).data(cell.backbone, "eval")
    benchmark = get_benchmark(cell.benchmark, entry, episodes)
    model, tokenizer, digests = load_model(cell.config, cell.backbone, cell.strategy, cell.seed)
    contexts = list(benchmark.contexts())
    if cell.limit is not None:
        contexts = first_questions(contexts, cell.limit)
    reader, encoder = reader_and_encoder(model, tokenizer, contexts[0].questions[0])
    conditions: Sequence[str] = how.conditions
    if not reader.has_memory:
        conditions = [name for name in CONDITIONS_WITHOUT_MEMORY if name in conditions] or ["none"]
    costs = []
    strategy = cell.config.strategies.get(cell.strategy)
    if strategy is not None and not strategy.trained:
        conditions = ["full"]
        with reader.cost(strategy.kind) as cost:
            transform = context_transform(strategy, Summaries(reader, encoder, how.batch_size), str(reader.device))
            contexts = [short for context in contexts for short in transform(context)]
        costs.append(cost)
    digests["contexts"] = _contexts_digest(contexts)
    settings = {"dtype": str(model.dtype), "window": encoder.window, "max_new_tokens": how.max_new_tokens}
    log = cell.log(settings, digests)
    if not log.costs:  # an earlier run has logged what the transform cost it
        for cost in costs:
            log.add([], cost)
    cache_bytes = CACHE_BYTES
    if reader.device.type == "cuda":
        cache_bytes = int(torch.cuda.mem_get_info(reader.device)[1] * min(1.0, how.gpus) * CACHE_SHARE)
    Engine(benchmark, contexts, reader, encoder, log, how.batch_size, how.max_new_tokens, cache_bytes, console).run(
        conditions
    )
    return log, Answers(log.records, benchmark.metrics, {})


def _answer_task(cell: Cell) -> tuple[RecordLog, Answers]:
    """A task of lm-evaluation-harness, which has no history and one condition, ``full``."""
    from pipelines.harness.tasks import run_lm_eval

    entry = cell.config.entry("benchmarks", cell.benchmark)
    if cell.limit is not None:
        entry = entry.model_copy(update={"max_questions": cell.limit})
    model, tokenizer, digests = load_model(cell.config, cell.backbone, cell.strategy, cell.seed)
    log = cell.log({"dtype": str(model.dtype), "entry": entry.model_dump(mode="json")}, digests)
    records, harness = run_lm_eval(model, tokenizer, entry, cell.config.evaluate.batch_size, log, console)
    return log, Answers(records, entry.metrics, {"harness": harness})


def _contexts_digest(contexts: Sequence[Context]) -> str:
    """sha256 (hex) over all histories, questions and references, in their order."""
    total = hashlib.sha256()
    for context in contexts:
        total.update(json.dumps(asdict(context), sort_keys=True, ensure_ascii=False, default=str).encode())
    return total.hexdigest()


if __name__ == "__main__":
    run_stage(app)
