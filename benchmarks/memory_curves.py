"""How much a memory holds, how long, and where: `python -m benchmarks.memory_curves capacity|retention|layers --help`.

Of an adapter that lies anywhere, with a picture each. The numbers are those of the state of the right text and, as the
control, of another text's; intervals are clustered by document.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer

from benchmarks.asking import (
    OF_FILES,
    Adapter,
    Backbone,
    Batch,
    How,
    OfSource,
    Samples,
    ask,
    find_set,
    in_columns,
    some_questions,
)
from benchmarks.measure import report, run_benchmark
from deltamem import DeltaMemModel
from deltamem.chat.messages import EncodedMessages, Message
from pipelines.backbones.prepared import load_backbone
from pipelines.benchmarks import Benchmark, Context, Question
from pipelines.config.conditions import one_layer_swapped
from pipelines.config.data import GeneratedSource
from pipelines.evaluation.effects import layer_effects
from pipelines.evaluation.examiner import reader_and_encoder
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.evaluation.results import NLL, Scores
from pipelines.evaluation.statistics import Bootstrap
from pipelines.reporting import charts

app = typer.Typer(help="How much a memory holds, how long, and where.", add_completion=False)

Set = Annotated[str, typer.Argument(help=f"NAME=FILE; names: {', '.join(OF_FILES)}")]
Out = Annotated[Path, typer.Option(help="folder for the picture, the numbers and every answer")]
Questions = Annotated[int, typer.Option(min=1, help="asked, of different documents first")]
OUT = Path("results/memory_curves")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class EachAlone(PromptEncoder):
    """Writes every message as a conversation of its own, as trainings with ``write_after`` do."""

    def history(self, messages: Sequence[Message]) -> list[EncodedMessages]:
        alone = super().history
        return [piece for message in messages for piece in alone([message])]


class Model(NamedTuple):
    """What asks an adapter, and what it is called."""

    reader: Reader
    encoder: EachAlone
    name: str


@app.command()
def capacity(
    backbone: Backbone,
    adapter: Adapter,
    facts: Annotated[list[int], typer.Option(min=1, help="facts in a text")] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006
    questions: Questions = 192,
    batch_size: Batch = 64,
    samples: Samples = 2000,
    device: str = DEVICE,
    out: Out = OUT / "capacity",
) -> None:
    """Exact match against the number of generated facts in one text ("The codename of Velmora is otter.")."""
    how, model = How(questions, batch_size, out, Bootstrap(samples)), _load(backbone, adapter, device)

    def rows() -> Iterator[dict[str, Any]]:
        for count in facts:
            texts = max(2, -(-questions // min(count, 4)))
            source = GeneratedSource(kind="generated", told="text", facts_per_paper=count, eval_papers=texts, seed=42)
            benchmark = OfSource(f"{count}-facts", source)
            contexts = some_questions(list(map(_shuffled, benchmark.contexts())), questions)
            yield from _compared(model, benchmark, contexts, {"facts": count}, how)

    measured = report(rows(), f"Facts that {model.name} holds", torch.device(device), out / "rows.json")
    _draw(measured, "facts", "facts in the text", model, {"exact_match": "exact match"}, out)


@app.command()
def retention(
    backbone: Backbone,
    adapter: Adapter,
    of: Set,
    after: Annotated[list[int], typer.Option(min=0, help="texts written after the right one")] = [0, 1, 2, 4, 8, 16],  # noqa: B006
    questions: Questions = 400,
    batch_size: Batch = 64,
    samples: Samples = 2000,
    device: str = DEVICE,
    out: Out = OUT / "retention",
) -> None:
    """The right text, then others of the set, each a conversation of its own, then the question."""
    benchmark = find_set(of, OF_FILES)
    how, model = How(questions, batch_size, out, Bootstrap(samples)), _load(backbone, adapter, device)
    every = list(benchmark.contexts())
    asked = some_questions(every, questions)

    def rows() -> Iterator[dict[str, Any]]:
        for count in after:
            contexts = with_others_after(every, asked, count)
            between = {"texts after": count, "tokens after": _mean_tokens(model, contexts, count)}
            yield from _compared(model, benchmark, contexts, between, how)

    measured = report(rows(), f"How long {model.name} holds {benchmark.name}", torch.device(device), out / "rows.json")
    units = {NLL: "answer NLL (nats per token)", benchmark.metrics[0]: benchmark.metrics[0].upper()}
    _draw(measured, "texts after", "other texts written since", model, units, out)


@app.command()
def layers(
    backbone: Backbone,
    adapter: Adapter,
    of: Set,
    questions: Questions = 400,
    batch_size: Batch = 64,
    samples: Samples = 2000,
    device: str = DEVICE,
    out: Out = OUT / "layers",
) -> None:
    """Which layers carry a text: the state of one layer at a time is another text's, or all are each other's."""
    benchmark = find_set(of, OF_FILES)
    how, model = How(questions, batch_size, out, Bootstrap(samples)), _load(backbone, adapter, device)
    benchmark.max_new_tokens = 1  # only likelihoods are compared
    contexts = some_questions(list(benchmark.contexts()), questions)
    names = list(model.reader.start(1).memory.states)
    conditions = ["state", "swapped", "permuted", *map(one_layer_swapped, names)]
    records, numbers = ask(model.reader, model.encoder, benchmark, contexts, conditions, benchmark.name, how)
    scores = Scores(records)
    gains = scores.gains(NLL)
    columns = {str(name): column.to_numpy() for name, column in gains.items()}
    found = layer_effects(columns, scores.clusters(gains.index), how.bootstrap)
    whole = {"all swapped": "memory_effect_nll", "all permuted": "layer_effect_nll"}
    rows = [{"layer": name} | numbers["effects"][effect] for name, effect in whole.items()]
    rows += [{"layer": layer} | estimate.to_dict() for layer, estimate in found.items()]
    report(rows, f"Where {model.name} holds {benchmark.name}", torch.device(device), out / "rows.json")
    charts.write_by_layer(found, "NLL (nats per token),\none layer swapped − state", out / "layers.svg")
    print(f"Picture: {out / 'layers.svg'}")


def with_others_after(every: Sequence[Context], asked: Sequence[Context], count: int) -> list[Context]:
    """The contexts that are asked, each with ``count`` texts of other documents after its own.

    The others are drawn among those that nothing is asked about; fewer are the first of more. Raises typer.BadParameter
    where there aren't so many.
    """
    about = {context.context_id for context in asked}
    longer = []
    for context in asked:
        own = context.questions[0].cluster_id
        others = [c for c in every if c.context_id not in about and c.questions[0].cluster_id != own]
        if len(others) < count:
            raise typer.BadParameter(f"{count} other texts are to be written, and the set has {len(others)}")
        drawn = random.Random(context.context_id).sample(others, len(others))[:count]
        history = [*context.to_write, *(message for other in drawn for message in other.to_write)]
        longer.append(replace(context, history=history, written=None))
    return longer


def _shuffled(context: Context) -> Context:
    """Its questions in another order than that of the text, so that the first ones are of the whole of it."""
    order = random.Random(context.context_id).sample(context.questions, len(context.questions))
    return replace(context, questions=order)


def _load(backbone: Path, adapter: str, device: str) -> Model:
    base, tokenizer = load_backbone(backbone, device=device)
    model = DeltaMemModel.from_pretrained(base, adapter)
    question = Question("", "", [{"role": "user", "content": "What?"}], ["That."])
    reader, encoder = reader_and_encoder(model, tokenizer, question)
    return Model(reader, EachAlone(encoder.tokenizer, encoder.segment, encoder.window), Path(adapter).name)


def _mean_tokens(model: Model, contexts: Sequence[Context], count: int) -> int:
    """How many tokens the last ``count`` messages of the contexts have, on average."""
    last = [model.encoder.history(context.to_write[-count:]) if count else [] for context in contexts]
    return round(sum(len(piece.input_ids) for pieces in last for piece in pieces) / len(contexts))


def _compared(
    model: Model, benchmark: Benchmark, contexts: Sequence[Context], at: dict[str, int], how: How
) -> Iterator[dict[str, Any]]:
    """A row for the right state, one for another's and one for what lies between, at one place of a curve."""
    name = "-".join([benchmark.name, *map(str, at.values())])
    _, numbers = ask(model.reader, model.encoder, benchmark, contexts, ["state", "swapped"], name, how)
    metrics = (NLL, *benchmark.metrics)
    told = {what: {m: found[m] for m in metrics} for what, found in numbers["conditions"].items()}
    told["memory effect"] = {m: numbers["effects"][f"memory_effect_{m}"] for m in metrics}
    for what, found in told.items():
        yield {**at, "what": what, **in_columns(found)}


def _draw(rows: Sequence[dict[str, Any]], x: str, x_unit: str, model: Model, units: dict[str, str], out: Path) -> None:
    """A picture of every metric in ``units``, METRIC.svg."""
    table = pd.DataFrame(rows).rename(columns={"what": "name"}).assign(method=model.name)
    for metric, unit in units.items():
        columns = {metric: "value", f"{metric} low": "low", f"{metric} high": "high"}
        with plt.rc_context(charts.STYLE):
            figure = charts.lines(table.rename(columns=columns), x, [model.name], unit, x_unit)
            charts.save(figure, out / f"{metric}.svg")
        print(f"Picture: {out / f'{metric}.svg'}")


if __name__ == "__main__":
    run_benchmark(app)
