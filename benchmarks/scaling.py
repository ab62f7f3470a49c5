"""A training step on one GPU and on several of a host, without Ray and data: `python -m benchmarks.scaling --help`.

The step is a worker's: the same DeepSpeed engine, one text and question in a micro-batch, as many of those as the batch
has for each worker. Random weights are drawn on each device, so a run of a large shape takes a minute or two. What a
training loses beyond what is measured here it loses to Ray and to reading episodes (`benchmarks.eight_gpus` has both).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch.profiler import profile

from benchmarks.eight_gpus import communication
from benchmarks.measure import report, run_benchmark
from benchmarks.processes import free_port, join_process_group
from benchmarks.shapes import SHAPE_NAMES, known_shapes, random_backbone
from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.acceleration import compile_norms_and_mlps
from pipelines.config import Train
from pipelines.training.batches import EpisodeBatch, Read, Texts, make_reads
from pipelines.training.objective import MemoryObjective


class Work(NamedTuple):
    """What each worker does."""

    shape: str
    strategy: str
    written: int
    read: int
    batch: int
    steps: int
    compiled: bool
    device: str


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "qwen3-4b",
    strategy: Annotated[str, typer.Option(help="tsw or msw")] = "tsw",
    workers: Annotated[list[int], typer.Option(help="one a GPU")] = [1, 2],  # noqa: B006
    written: Annotated[int, typer.Option(help="tokens written")] = 8192,
    read: Annotated[int, typer.Option(help="tokens read, half of them supervised")] = 512,
    batch: Annotated[int, typer.Option(help="questions in a step, of all workers together")] = 8,
    steps: Annotated[int, typer.Option(help="steps timed, after two others")] = 3,
    compiled: Annotated[bool, typer.Option(help="compile the backbone's norms and MLPs")] = False,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Seconds a step and what several workers get of the first number's speed, each for itself."""
    work = Work(shape, strategy, written, read, batch, steps, compiled, device)
    title = f"Scaling of a training step, {shape}, {strategy}, {written} + {read}, batch {batch}"
    report(_rows(work, workers), title + (", compiled" if compiled else ""), torch.device(device), out)


def _rows(work: Work, counts: list[int]) -> Iterator[dict[str, Any]]:
    first = None
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "row.json"
            mp.spawn(_worker, (count, work, str(file), free_port()), nprocs=count)
            row = json.loads(file.read_text())
        first = first or row["step s"] * count
        yield {"workers": count, **row, "efficiency": first / (row["step s"] * count)}


def _worker(rank: int, count: int, work: Work, file: str, port: int) -> None:
    """One process of a measurement; the first leaves the row."""
    from pipelines.training import deepspeed_engine as engines

    gpu = work.device == "cuda"
    place = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(place)
    began = time.perf_counter()
    join_process_group(place, port, rank, count)
    base = random_backbone(work.shape, place)
    if work.compiled:
        compile_norms_and_mlps(base)
    torch.manual_seed(0)
    objective = MemoryObjective(get_delta_mem_model(base, DeltaMemConfig(strategy=work.strategy)), 0.0, 0.0)
    accumulation = work.batch // count
    train = Train(precision="bfloat16" if gpu else "float32", num_workers=count, use_gpu=gpu)
    engine = engines.make_engine(objective, train, place)
    engines.set_learning_rate(engine, 1e-3)
    torch.manual_seed(rank)
    batches = [_batch(work, base.config.vocab_size) for _ in range(accumulation)]

    def step() -> None:
        for _ in engines.learn(engine, [micro.to(place) for micro in batches], [1 / accumulation] * accumulation):
            pass
        engines.gradient_norm(engine)

    step()
    first = time.perf_counter() - began
    step()
    seconds = []
    for _ in range(work.steps):
        dist.barrier()
        began = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    row = {"step s": sorted(seconds)[len(seconds) // 2], "first step done after s": first}
    row |= {"tokens/s": work.batch * (work.written + work.read) / row["step s"]}
    row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0} | _profiled(step)
    if rank == 0:
        Path(file).write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def _batch(work: Work, vocabulary: int) -> EpisodeBatch:
    ids = torch.randint(vocabulary, (1, work.written + work.read))
    asked, answer = ids[0, work.written :].tensor_split(2)
    reads = make_reads([Read(asked.tolist(), answer.tolist(), 0)], 1.0, 0)
    context = ids[:, : work.written]
    texts = Texts(context, torch.zeros_like(context), None)
    return EpisodeBatch(**vars(reads), **vars(texts), papers=["0"], tokens=ids.numel())


def _profiled(step) -> dict[str, float]:
    """How much of a step's time collectives take, and how much in which nothing else runs."""
    with profile() as profiler, torch.profiler.record_function("ProfilerStep#0"):
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return communication(json.loads(trace.read_text())["traceEvents"])


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
