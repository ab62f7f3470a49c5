"""Many questions after one long beginning: `python -m benchmarks.shared_beginning --help`.

Its keys and values copied for every question, as many questions at once as there is room for, against all of them
attending to it where it lies. Each way reads the questions, measures an answer and generates one, as evaluation does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import median_seconds, peak_gib, report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, backbone_of, known_shapes
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.chat.messages import EncodedMessages
from pipelines.evaluation.passes import Reader


def main(
    base: Annotated[str | None, typer.Option(help="backbone folder; its weights don't matter for time")] = None,
    shape: Annotated[str, typer.Option(callback=known_shapes, help=f"without --base: {SHAPE_NAMES}")] = "tiny",
    strategy: Annotated[str, typer.Option(help="tsw, ssw or msw")] = "tsw",
    beginning: Annotated[int, typer.Option(help="tokens that the questions share")] = 8000,
    questions: int = 64,
    asked: Annotated[int, typer.Option(help="tokens of a question")] = 40,
    answer: Annotated[int, typer.Option(help="tokens of an answer")] = 16,
    copies: Annotated[list[int], typer.Option(help="questions at once where copied")] = [8, 16],  # noqa: B006
    repeats: int = 3,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Questions per second, and peak GPU memory, after a beginning that is copied or shared."""
    place = torch.device(device)
    backbone = backbone_of(base, shape, place, torch.bfloat16)
    model = get_delta_mem_model(backbone, DeltaMemConfig(strategy=strategy)).requires_grad_(False).to(torch.bfloat16)
    reader, vocabulary = Reader(model.eval(), [], 0), backbone.config.get_text_config(decoder=True).vocab_size

    def drawn(length: int) -> EncodedMessages:
        return EncodedMessages(torch.randint(vocabulary, (length,)).tolist(), [0] * length)

    read = reader.read(reader.start(1), [drawn(beginning)], True)
    body, answers = drawn(asked), drawn(answer).input_ids

    def ask(start, at_once: int) -> None:
        for done in range(0, questions, at_once):
            count = min(at_once, questions - done)
            rows, last = reader.read(start.select([0] * count), [body] * count, True), [0] * count
            reader.answer_nll(rows, last, [answers] * count, True)
            reader.generate(rows, last, [answer] * count, True)

    def rows():
        ways = [*((f"copied, {count} at once", read, count) for count in copies)]
        for what, start, at_once in [*ways, ("shared", read.beginning(0), questions)]:
            seconds = median_seconds(lambda s=start, n=at_once: ask(s, n), place, repeats, 1)
            peak = peak_gib(lambda s=start, n=at_once: ask(s, n), place)
            yield {"what": what, "questions/s": questions / seconds, "peak GiB": peak}

    title = f"{questions} questions after {beginning} tokens, {base or shape}, {strategy}"
    report(rows(), title, place, out)


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
