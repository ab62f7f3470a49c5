"""The training loop of one Ray Train worker, readable from top to bottom."""

from __future__ import annotations

import csv
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from deltamem.backbone.acceleration import compile_norms_and_mlps
from deltamem.tools.measuring import peak_bytes
from pipelines.backbones.prepared import load_backbone
from pipelines.config import load_config
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import recipe_of
from pipelines.training import deepspeed_engine as engines
from pipelines.training.batches import Schedule
from pipelines.training.learning_rate import learning_rate

CURVE_FIELDS = ("step", "loss", "answer_nll", "memory_effect", "write_gate", "state_norm", "gradient_norm",
                "learning_rate", "tokens_per_second", "seconds")  # fmt: skip


@dataclass(frozen=True)
class WorkerTask:
    """What a worker needs to know; paths are absolute, because a worker's folder is elsewhere."""

    config_path: str
    root: str
    backbone: str
    strategy: str
    seed: int
    curve: str


def train_worker(task: dict[str, Any]) -> None:
    """Train one cell on this worker (Ray calls it on each), from the last checkpoint if there is one."""
    task = WorkerTask(**task)
    config = load_config(task.config_path).model_copy(update={"results_dir": task.root})
    cell = config.cell(task.backbone, task.strategy, task.seed)
    train, context = cell.train, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    torch.manual_seed(task.seed)
    recipe = recipe_of(config, cell)
    episodes, _ = recipe.episodes()
    schedule = Schedule(episodes, train, task.seed, workers)
    base, _ = load_backbone(Layout(config).backbone(task.backbone), device=device)
    if train.compile_backbone:
        compile_norms_and_mlps(base)
    objective = recipe.objective(base)
    engine = engines.make_engine(objective, train, schedule.micro, schedule.accumulation, device)
    look_every = train.measure_memory_every if recipe.has_memory else 0
    start = _resume(engine)
    curve = _Curve(Path(task.curve), start) if rank == 0 else None

    for step in range(start, schedule.steps):
        began = time.perf_counter()
        rate = learning_rate(train, step, schedule.steps)
        engines.set_learning_rate(engine, rate)
        losses, tokens, effect = [], 0, None
        micro_batches = schedule.micro_batches(step, rank)
        if look_every and step % look_every == 0:  # before the step has learnt from them
            batches = [(recipe.collate(episodes, groups).to(device), weight) for groups, weight in micro_batches]
            effect = objective.memory_effect(batches)
        for groups, weight in micro_batches:
            batch = recipe.collate(episodes, groups)
            tokens += batch.tokens
            metrics = recipe.metrics(engine(batch.to(device)))
            engine.backward(metrics["loss"] * weight)
            engine.step()  # updates at the step's last micro-batch only
            losses.append(torch.stack([x.detach().float() for x in metrics.values()]) * weight)
        means = dict(zip(metrics, torch.stack(losses).mean(0), strict=True))
        means |= {} if effect is None else {"memory_effect": effect}
        row, tokens = _reduce(means, tokens, workers)
        seconds = time.perf_counter() - began
        row |= {"step": step + 1, "gradient_norm": float(engine.get_global_grad_norm()), "learning_rate": rate}
        row |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
        if curve:
            curve.add(row)
        last = step + 1 == schedule.steps
        if last or (step + 1) % train.checkpoint_every == 0:
            _report(engine, step + 1, row, rank, device)


def _resume(engine) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return engines.load_state(Path(folder), engine)


def _reduce(means: dict[str, torch.Tensor], tokens: int, workers: int) -> tuple[dict[str, float], int]:
    """Mean of the metrics and sum of the tokens over all workers."""
    means_only = torch.stack(list(means.values()))
    values = torch.cat([means_only, means_only.new_tensor([tokens])])
    dist.all_reduce(values)
    *sums, tokens = values.tolist()
    return {name: value / workers for name, value in zip(means, sums, strict=True)}, int(tokens)


def _report(engine, step: int, row: dict[str, float], rank: int, device: torch.device) -> None:
    """Every worker reports; the first one's report carries the checkpoint."""
    tensors = engines.gather_state(engine)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            engines.save_state(Path(folder), tensors, step, {"metrics": row, "peak_memory_bytes": peak_bytes(device)})
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(row, checkpoint=checkpoint)


class _Curve:
    """One CSV row per optimiser step, which the stage's progress bar reads while it grows.

    A column that the kind of adapter doesn't have stays empty.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        kept = []
        if start and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, CURVE_FIELDS)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: dict[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, CURVE_FIELDS).writerow(row)
