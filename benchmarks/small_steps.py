"""Training steps of a small backbone, plain and as CUDA graphs: `python -m benchmarks.small_steps --help`.

Random weights of SmolLM2-135M's shape, on which time doesn't depend, and made-up texts: "short", 48 of a sentence with
72 questions; "recipe", 64 with 96 questions, told apart and 16 of them repeated (docs/remember.md); "evidence", 64 as
long as QASPER's evidence, with a question each, in two micro-batches. A step is what a worker's is: tensors to the
device, write, read and backward, clipping, AdamW, and a wait for the loss.

Every way starts from the same adapter and takes the same batches: "first loss" and "apart", the largest distance of its
losses from the plain step's, tell whether it computes the same. Where DeepSpeed is installed, its engine takes the
place of clipping and AdamW in the ways that say so.
"""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import peak_gib, report, run_benchmark
from benchmarks.processes import free_port, join_process_group
from benchmarks.shapes import SHAPE_NAMES, known_shapes, random_backbone
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.compiled_layers import compile_backbone
from pipelines.training.batches import EpisodeBatch, Read, Texts, make_reads, pad
from pipelines.training.graphs import StepGraphs
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import cut_evenly

BATCHES = 3
"""Different ones, taken in turns: training's lengths differ from step to step too."""
WORK = {"short": (48, 72), "recipe": (64, 96), "evidence": (64, 64)}
WAYS = ("plain", "graphed", "graphed, compiled", "graphed, layers compiled", "graphed, compiled, DeepSpeed")

Step = list[tuple[EpisodeBatch, float]]
"""The micro-batches of a step, and their shares of its loss."""


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "smollm2-135m",
    work: Annotated[list[str], typer.Option(help="short, recipe or evidence")] = list(WORK),  # noqa: B006
    way: Annotated[list[str], typer.Option(help="plain or graphed; , (layers) compiled; , DeepSpeed")] = list(WAYS),  # noqa: B006
    steps: Annotated[int, typer.Option(help="steps timed, after two rounds of the batches")] = 9,
    states: Annotated[int, typer.Option(help="8×8 states a layer")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    scale: Annotated[float, typer.Option(help="share of the texts and questions")] = 1.0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Milliseconds a step and episodes per second, and whether the losses agree."""
    place = torch.device(device)
    if dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False

    def rows() -> Iterator[dict[str, Any]]:
        for kind in work:
            plain: list[float] = []
            for how in way:
                named = {"work": kind, "way": how}
                gc.collect()  # an objective and its graphs hold each other
                try:
                    objective = _objective(shape, states, getattr(torch, dtype), how, kind, place)
                    measured, losses = _measure(objective, _steps(kind, scale, objective), how, steps, place)
                except Exception as error:  # the other ways are still worth their figures
                    traceback.print_exc()
                    yield named | {"ms a step": f"failed: {type(error).__name__}"}
                    continue
                plain = plain or losses
                apart = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
                yield named | measured | {"first loss": losses[0], "last loss": losses[-1], "apart": apart}

    report(rows(), f"Steps of a small backbone, {shape}, {states} states, {dtype}", place, out)


def _objective(shape: str, states: int, dtype: torch.dtype, way: str, kind: str, place: torch.device):
    base = random_backbone(shape, place).to(dtype)
    if "compiled" in way:
        torch.compiler.reset()
        compile_backbone(base, "layers" if "layers" in way else True)
    torch.manual_seed(0)
    model = get_delta_mem_model(base, DeltaMemConfig(strategy="msw", num_states=states))
    objective = MemoryObjective(model, 0.0, 0.05, repeat_weight=0.5 if kind == "recipe" else 0.0)
    if "graphed" in way:
        objective.graphs = StepGraphs(objective)
    return objective


def _steps(kind: str, scale: float, objective: MemoryObjective) -> list[Step]:
    """As many steps as there are different batches."""
    draw = random.Random(0)
    vocabulary = objective.model[0].base_model.config.vocab_size
    texts, questions = (max(4, round(count * scale)) for count in WORK[kind])

    def tokens(count: int) -> list[int]:
        return [3 + int(draw.random() * (vocabulary - 3)) for _ in range(count)]

    return [_step(kind, texts, questions, tokens, draw) for _ in range(BATCHES)]


def _step(kind: str, texts: int, questions: int, tokens: Callable[[int], list[int]], draw: random.Random) -> Step:
    if kind == "evidence":
        lengths = sorted(min(3000, round(565 * draw.lognormvariate(0, 0.65))) for _ in range(texts))
        cuts = cut_evenly(lengths, 2)
        runs = [lengths[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [
            (_batch([tokens(n) for n in run], range(len(run)), tokens, draw, False), len(run) / texts) for run in runs
        ]
    written = [tokens(draw.randint(38, 88)) for _ in range(texts)]
    owners = [*range(texts), *draw.sample(range(texts), questions - texts)]
    return [(_batch(written, owners, tokens, draw, kind == "recipe"), 1.0)]


def _batch(
    texts: Sequence[list[int]], owners: Sequence[int], tokens: Callable[[int], list[int]], draw: random.Random,
    further: bool,
) -> EpisodeBatch:  # fmt: skip
    reads = [Read(tokens(draw.randint(30, 44)), tokens(draw.randint(2, 12)), owner) for owner in owners]
    repeated = draw.sample(range(len(texts)), max(1, len(texts) // 4)) if further else []
    ids, mask = pad(list(texts), 2)
    written = Texts(ids, torch.zeros_like(ids), mask)
    return EpisodeBatch(
        **vars(make_reads(reads, 1 / len(reads), 2)),
        **vars(written),
        papers=[str(number) for number in range(len(texts))],
        tokens=sum(map(len, texts)) + sum(len(read.asked) + len(read.answer) for read in reads),
        others=torch.tensor([(owner + 1) % len(texts) for owner in owners]) if further else None,
        contrast=torch.tensor(0.5) if further else None,
        repeat=make_reads([Read(tokens(34), texts[n], n) for n in repeated], 1 / len(repeated), 2) if further else None,
    )


def _measure(
    objective: MemoryObjective, batches: list[Step], way: str, steps: int, place: torch.device
) -> tuple[dict[str, Any], list[float]]:
    """The figures of a way, and its losses from the first step on."""
    learn = _engine(objective, place) if "DeepSpeed" in way else _adamw(objective, place)
    losses: list[float] = []

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            losses.append(learn(batches[len(losses) % len(batches)]))
        return time.perf_counter() - began

    first = run(1)
    run(2 * len(batches) - 1)
    seconds = run(steps) / steps
    peak = peak_gib(lambda: run(len(batches)), place)
    questions = sum(len(batch.owner) for step in batches for batch, _ in step) / len(batches)
    graphs = objective.graphs.count if isinstance(objective.graphs, StepGraphs) else None
    figures = {"ms a step": 1000 * seconds, "episodes/s": questions / seconds, "peak GiB": peak, "graphs": graphs}
    return figures | {"first step s": first}, losses


def _adamw(objective: MemoryObjective, place: torch.device) -> Callable[[Step], float]:
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0, fused=place.type == "cuda")

    def learn(step: Step) -> float:
        total = torch.zeros((), device=place)
        for batch, share in step:
            loss = objective(batch.to(place)).loss * share
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return learn


def _engine(objective: MemoryObjective, place: torch.device) -> Callable[[Step], float]:
    """The same by the engine that trains, in a process group of one."""
    from pipelines.config import Train
    from pipelines.training import deepspeed_engine as engines

    if not torch.distributed.is_initialized():
        join_process_group(place, free_port())
    engine = engines.make_engine(objective, Train(precision="float32", num_workers=1), place)
    engines.set_learning_rate(engine, 1e-3)

    def learn(step: Step) -> float:
        batches, shares = [batch.to(place) for batch, _ in step], [share for _, share in step]
        total = torch.zeros((), device=place)
        for result, share in zip(engines.learn(engine, batches, shares), shares, strict=True):
            total += result.loss.detach() * share
        engines.gradient_norm(engine)
        return total.item()

    return learn


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
