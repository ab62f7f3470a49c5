"""What an adapter remembers of real text and of chats: `python -m benchmarks.real_text --help`.

Every set is asked of the frozen backbone (none, full), of the adapter (none, state, swapped, full) and, where one is
given, of a LoRA that was trained without ever seeing a text (none): what adaptation alone buys. ``replies``, in which
the frozen backbone's own replies are the right ones, is asked of the adapter alone: steering nothing (strength_0), with
an empty memory and with a filled one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.asking import SETS, Adapter, Backbone, Batch, How, Samples, ask, find_set, in_columns, some_questions
from benchmarks.measure import report, run_benchmark
from deltamem import DeltaMemModel
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks import Benchmark, Context
from pipelines.benchmarks.chat_replies import ChatReplies
from pipelines.evaluation.effects import EFFECTS
from pipelines.evaluation.examiner import reader_and_encoder
from pipelines.evaluation.own_replies import with_own_replies
from pipelines.evaluation.records import Record
from pipelines.evaluation.results import NLL, Scores
from pipelines.evaluation.statistics import Bootstrap, paired_difference
from pipelines.strategies.lora import load_lora


class Asked(NamedTuple):
    """A model and the conditions that it is asked under."""

    name: str
    model: Any
    conditions: Sequence[str]


def main(
    backbone: Backbone,
    adapter: Adapter,
    sets: Annotated[
        list[str],
        typer.Argument(help=f"NAME=FILE; chat, unseen, replies, or chat=CONVERSATIONS; names: {', '.join(SETS)}"),
    ],
    lora: Annotated[
        Path | None, typer.Option(help="a LoRA trained without any text, as lora_without_context is")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="of each set, at most: of different documents first")] = 400,
    batch_size: Batch = 64,
    write_tokens: Annotated[
        int | None, typer.Option(min=1, help="of a text, written in one pass at most; the backbone's window")
    ] = None,
    samples: Samples = 2000,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="folder for the numbers and for every answer")] = Path("results/real_text"),
) -> None:
    """Answers under the controlled conditions, with intervals clustered by document."""
    benchmarks = list(map(find_set, sets))
    how = How(questions, batch_size, out, Bootstrap(samples), write_tokens)
    rows = _rows(backbone, adapter, lora, benchmarks, torch.device(device), how)
    report(rows, f"{Path(adapter).name} on real text", torch.device(device), out / "rows.json")


def _rows(
    backbone: Path, adapter: str, lora: Path | None, benchmarks: Sequence[Benchmark], device: torch.device, how: How
) -> Iterator[dict[str, Any]]:
    base, tokenizer = load_backbone(backbone, device=device)
    contexts = {benchmark.name: _contexts(benchmark, base, tokenizer, how) for benchmark in benchmarks}
    states: dict[str, list[Record]] = {}
    for asked in _models(base, adapter, lora):
        for benchmark in benchmarks:
            chosen, conditions = contexts[benchmark.name], asked.conditions
            if isinstance(benchmark, ChatReplies):
                if asked.name != "adapter":
                    continue
                conditions = ["strength_0", "none", "state"]
            parts = reader_and_encoder(asked.model, tokenizer, chosen[0].questions[0], how.write_tokens)
            records, numbers = ask(*parts, benchmark, chosen, conditions, f"{benchmark.name}-{asked.name}", how)
            yield from _told(benchmark, asked.name, numbers)
            if asked.name == "adapter":
                states[benchmark.name] = records
            elif asked.name == "lora":
                yield _against(benchmark, states[benchmark.name], records, how)


def _contexts(benchmark: Benchmark, base: Any, tokenizer: Any, how: How) -> list[Context]:
    """What is asked about, with the frozen backbone's own replies where they are the right ones."""
    chosen = some_questions(list(benchmark.contexts()), how.questions)
    if not isinstance(benchmark, ChatReplies):
        return chosen
    parts = reader_and_encoder(base, tokenizer, chosen[0].questions[0])
    return with_own_replies(chosen, *parts, benchmark.max_new_tokens, how.batch_size)


def _models(base: Any, adapter: str, lora: Path | None) -> Iterator[Asked]:
    """The models one after the other, all on the same backbone."""
    yield Asked("frozen", base, ["none", "full"])
    model = DeltaMemModel.from_pretrained(base, adapter)
    yield Asked("adapter", model, ["none", "state", "swapped", "full"])
    model.unload()
    if lora is not None:
        yield Asked("lora", load_lora(base, lora), ["none"])


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
    return {"set": name, "model": model, "what": what, **in_columns(found)}


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
