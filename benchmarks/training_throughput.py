"""Training throughput on real episodes, one process: `python -m benchmarks.training_throughput --help`.

Episodes per second of whole optimiser steps (write pass, read pass, backward, AdamW), data handling included. Needs
the folders that the stages backbone and preprocess write. Ways of dealing with unequal lengths stand side by side:
"even", a step's episodes sorted by length and cut so that the largest micro-batch is as small as possible (as training
does it); "sorted", cut into equal numbers of episodes; "drawn", in the order drawn; and "no padding", the written
tokens of "even" dealt into rows of equal length, which no way of packing could beat. All are warmed up before they are
timed.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import report, run_benchmark
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.acceleration import compile_norms_and_mlps
from pipelines.config import Train
from pipelines.data.shards import open_episodes
from pipelines.training.batches import collate
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import Schedule

ORDERS = ("even", "sorted", "drawn", "no padding")


def main(
    backbone: Annotated[Path, typer.Option(help="backbone folder")],
    episodes: Annotated[Path, typer.Option(help="folder of training episodes")],
    strategy: Annotated[list[str], typer.Option(help="tsw, ssw or msw")] = ["tsw", "ssw", "msw"],  # noqa: B006
    micro_batch: Annotated[list[int], typer.Option(help="episodes per forward pass")] = [8, 32],  # noqa: B006
    batch: Annotated[int, typer.Option(help="episodes per optimiser step")] = 128,
    steps: Annotated[int, typer.Option(help="steps timed, after as many to warm up")] = 4,
    order: Annotated[list[str], typer.Option(help="even, sorted, drawn or no padding")] = list(ORDERS),  # noqa: B006
    compiled: Annotated[bool, typer.Option(help="compile the backbone's layers")] = False,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Episodes and tokens per second of training."""
    place, table = torch.device(device), open_episodes(episodes)
    files = sorted(backbone.glob("*.gguf"))
    gguf = {"gguf_file": files[0].name} if files else {}
    base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16, **gguf).to(place).eval()
    if compiled:
        compile_norms_and_mlps(base)
    pad = AutoTokenizer.from_pretrained(backbone, **gguf).pad_token_id or 0

    def rows():
        for kind, micro in product(strategy, micro_batch):
            train = Train(batch_size=batch, micro_batch_size=micro, num_workers=1, epochs=99)
            model = get_delta_mem_model(base, DeltaMemConfig(strategy=kind))
            model.memory_layers.to(torch.bfloat16)  # as DeepSpeed trains it
            objective = MemoryObjective(model, 0.01, 0.05)
            for timed, way in product((False, True), order):  # the kernels for a length compile when it first comes
                try:
                    measured = _measure(objective, Schedule(table, train, 0, 1), table, pad, way, steps, place)
                except torch.OutOfMemoryError:
                    measured = {"episodes/s": None, "tokens/s": None, "peak GiB": "out of memory"}
                if timed:
                    yield {"strategy": kind, "micro-batch": micro, "order": way} | measured
            model.unload()

    title = f"Training throughput, {len(table)} episodes, {batch} a step{', compiled' if compiled else ''}"
    report(rows(), title, place, out)


def _batches(schedule, table, pad, order, step):
    """(groups of episodes, weight) of a step, and the batch made of them."""
    even = schedule.micro_batches(step, 0)
    if order not in ("sorted", "drawn"):
        for groups, weight, _ in even:
            batch = collate(table, groups, pad)
            yield groups, weight, _without_padding(batch) if order == "no padding" else batch
        return
    groups = [group for batch in even for group in batch.groups]
    if order == "drawn":
        groups = [groups[i] for i in torch.randperm(len(groups), generator=torch.Generator().manual_seed(step))]
    for start in range(0, len(groups), schedule.micro):
        part = groups[start : start + schedule.micro]
        yield part, 1.0, collate(table, part, pad)


def _without_padding(batch):
    """The same number of contexts and written tokens, but every context of the same length."""
    whole = torch.ones_like(batch.context_ids, dtype=torch.bool) if batch.context_mask is None else batch.context_mask
    rows = len(whole)
    length = int(whole.sum()) // rows
    ids, segments = (x[whole][: rows * length].view(rows, length) for x in (batch.context_ids, batch.segment_ids))
    return replace(batch, context_ids=ids, segment_ids=segments.sort(1).values, context_mask=None)


def _measure(objective, schedule, table, pad, order, steps, place):
    optimizer = torch.optim.AdamW(objective.parameters(), 2e-4, weight_decay=0.0, fused=place.type == "cuda")
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    episodes = tokens = 0
    _wait(place)
    began = time.perf_counter()
    for step in range(steps):
        for groups, weight, batch in _batches(schedule, table, pad, order, step):
            episodes, tokens = episodes + len(groups), tokens + batch.tokens
            (objective(batch.to(place)).loss * (weight / schedule.accumulation)).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(place)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else 0.0
    return {"episodes/s": episodes / seconds, "tokens/s": tokens / seconds, "peak GiB": peak}


def _wait(place):
    if place.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
