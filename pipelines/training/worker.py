"""The training loop of one Ray Train worker, readable from top to bottom."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from deltamem.backbone.compiled_layers import compile_backbone
from deltamem.tools.measuring import peak_bytes
from pipelines.backbones.prepared import load_backbone
from pipelines.training import checkpoint
from pipelines.training import deepspeed_engine as engines
from pipelines.training.ahead import one_ahead
from pipelines.training.batches import EpisodeBatch
from pipelines.training.curve import LOSS, SOURCE_NLL, STEP, Curve
from pipelines.training.divergence import Divergence
from pipelines.training.finite import require_finite
from pipelines.training.learning_rate import learning_rate
from pipelines.training.losses import nll_by_source
from pipelines.training.profiling import start_profiler
from pipelines.training.recipe import Recipe
from pipelines.training.schedule import MicroBatch
from pipelines.training.task import WorkerTask
from pipelines.training.validation import Validation

SAMPLED_STEPS = 400
"""Steps whose batches are looked at to plan the shapes of CUDA graphs."""

MEASURED_STEPS = 64
"""Steps, spread over the training, on whose batches is measured what the adapter's files have beside its weights."""


def train_worker(task: WorkerTask, saved: Path | None) -> None:
    """Train one cell on this worker (Ray calls it on each), from a checkpoint where there is one."""
    recipe, context = task.make_recipe(), ray.train.get_context()
    train, device = recipe.cell.train, ray.train.torch.get_device()
    rank, workers = context.get_world_rank(), context.get_world_size()

    torch.manual_seed(task.seed)
    episodes, _ = recipe.episodes()
    schedule = recipe.schedule(episodes, workers)
    base, _ = load_backbone(recipe.folder, device=device)
    compile_backbone(base, train.compile_backbone)
    recipe.prepare(base, episodes)
    objective = recipe.objective(base)
    if task.init_adapter:
        recipe.start_from(objective, Path(task.init_adapter))
    validation = Validation(recipe, rank, workers) if train.validate_every else None
    engine = engines.make_engine(objective, train, device)
    look_every = train.measure_memory_every if recipe.has_memory else 0
    start, crews, began_with = _resume(engine, saved, workers)
    divergence = Divergence(train, schedule.steps, began_with)
    more = validation.columns if validation else ()
    curve = Curve(Path(task.curve), start, recipe.sources, more) if rank == 0 else None
    profiler = start_profiler(train.profile_steps, Path(task.trace)) if train.profile_steps and rank == 0 else None

    def share(step: int) -> tuple[list[MicroBatch], list[EpisodeBatch]]:
        """What this worker reads in a step, and the same as tensors on its device."""
        micro_batches = schedule.micro_batches(step, rank)
        made = (recipe.collate(episodes, micro.groups, micro.beside) for micro in micro_batches)
        return micro_batches, [batch.to(device) for batch in made]

    if graphs := getattr(objective, "graphs", None):
        some = range(0, schedule.steps, -(-schedule.steps // SAMPLED_STEPS))
        graphs.prepare([batch for step in some for batch in share(step)[1]], schedule.steps * schedule.accumulation)

    began = time.perf_counter()
    for step, (micro_batches, batches) in one_ahead(share, range(start, schedule.steps)):
        rate = learning_rate(train, step, schedule.steps)
        engines.set_learning_rate(engine, rate)
        effect = {}
        if look_every and step % look_every == 0:  # before the step has learnt from them
            effect = {"memory_effect": _memory_effect(objective, recipe, episodes, micro_batches, device)}
        weights = [micro.weight for micro in micro_batches]
        means, by_source, tokens = _learn(engine, recipe, batches, weights)
        row, tokens = _reduce(means | effect, tokens, workers)
        row |= _means_by_source(by_source, recipe.sources)
        seconds = time.perf_counter() - began
        row |= {STEP: step + 1, "gradient_norm": engines.gradient_norm(engine), "learning_rate": rate}
        row |= {"tokens_per_second": tokens / seconds, "seconds": seconds}
        last = step + 1 == schedule.steps
        if validation and (last or (step + 1) % train.validate_every == 0):
            row |= validation.measure(objective, device)
        if curve:
            curve.add(row)
        numbers = {LOSS: row[LOSS], "gradient norm": row["gradient_norm"]}
        require_finite(numbers, f"in step {step + 1}", step, schedule.steps, train)
        divergence.add(numbers, step + 1)
        if last or (step + 1) % train.checkpoint_every == 0:
            after = _loss(engine, recipe, recipe.collate(episodes, micro_batches[-1].groups).to(device), workers)
            require_finite({LOSS: after}, f"after step {step + 1}", step + 1, schedule.steps, train)
            facts = {"metrics": row, "peak_memory_bytes": peak_bytes(device), "workers": crews}
            facts |= {"began_with": divergence.began} if divergence.began else {}
            found = _measured(recipe, objective, schedule.steps, share) if last else {}
            _report(engine, found, step + 1, row, facts, rank)
        if profiler:
            profiler.step()
        began = time.perf_counter()
    if profiler:
        profiler.stop()


def _resume(engine, saved: Path | None, workers: int) -> tuple[int, list[dict[str, int]], dict[str, float] | None]:
    """The steps that are done, by how many workers from which step on, and what the first of them were like."""
    start, crews, began_with = 0, [], None
    if saved is not None:
        tensors, record = checkpoint.load(saved)
        start, crews, began_with = record["step"], record["workers"], record.get("began_with")
        engines.set_state(engine, tensors, start)
    if not crews or crews[-1]["count"] != workers:
        crews = [*crews, {"count": workers, "from_step": start + 1}]
    return start, crews, began_with


def _memory_effect(
    objective, recipe: Recipe, episodes: pa.Table, micro_batches: Sequence[MicroBatch], device: torch.device
) -> Tensor:
    batches = [(recipe.collate(episodes, micro.groups).to(device), micro.weight) for micro in micro_batches]
    return objective.memory_effect(batches)


def _learn(
    engine, recipe: Recipe, batches: Sequence[EpisodeBatch], weights: Sequence[float]
) -> tuple[dict[str, Tensor], Tensor, int]:
    """One optimiser step; returns this worker's metrics, scalars on its device, sums by source, and the tokens read."""
    names, means = [], []
    by_source = torch.zeros(len(recipe.sources), 2, device=batches[0].input_ids.device)
    results = engines.learn(engine, batches, [weight / len(batches) for weight in weights])
    for result, batch, weight in zip(results, batches, weights, strict=True):
        metrics = recipe.metrics(result)
        if recipe.sources:
            by_source += nll_by_source(result.token_nll, batch, recipe.sources)
        names = list(metrics)
        means.append(torch.stack([x.detach().float() for x in metrics.values()]) * weight)
    tokens = sum(batch.tokens for batch in batches)
    return dict(zip(names, torch.stack(means).mean(0), strict=True)), by_source, tokens


@torch.no_grad()
def _loss(engine, recipe: Recipe, batch: EpisodeBatch, workers: int) -> float:
    """The mean of all workers' losses of one batch, without learning from it."""
    means, _ = _reduce({LOSS: recipe.metrics(engine.module(batch))[LOSS].float()}, 0, workers)
    return means[LOSS]


def _reduce(means: dict[str, Tensor], tokens: int, workers: int) -> tuple[dict[str, float], int]:
    """Mean of the metrics and sum of the tokens over all workers."""
    means_only = torch.stack(list(means.values()))
    values = torch.cat([means_only, means_only.new_tensor([tokens])])
    dist.all_reduce(values)
    *sums, tokens = values.tolist()
    return {name: value / workers for name, value in zip(means, sums, strict=True)}, int(tokens)


def _means_by_source(sums: Tensor, sources: Sequence[str]) -> dict[str, float]:
    """The answer NLL of the sources that any worker has asked questions of, by the names of the curve's columns."""
    if not sources:
        return {}
    dist.all_reduce(sums)
    found = zip(sources, sums.tolist(), strict=True)
    return {SOURCE_NLL + name: total / count for name, (total, count) in found if count}


def _measured(
    recipe: Recipe, objective, steps: int, share: Callable[[int], tuple[Any, list[EpisodeBatch]]]
) -> dict[str, Tensor]:
    """What the adapter's files have beside its weights, by its name in a checkpoint."""
    some = range(0, steps, -(-steps // MEASURED_STEPS))
    sums, count = recipe.measured(objective, (batch for step in some for batch in share(step)[1]))
    for value in (*sums.values(), count) if sums else ():
        dist.all_reduce(value)
    return {checkpoint.MEASURED + name: (value / count).cpu() for name, value in sums.items()}


def _report(
    engine, measured: dict[str, Tensor], step: int, row: dict[str, float], facts: dict[str, Any], rank: int
) -> None:
    """Every worker reports; the first one's report carries the checkpoint, with some facts recorded in it."""
    tensors = engines.gather_state(engine) | measured
    with tempfile.TemporaryDirectory() as folder:
        saved = None
        if rank == 0:
            checkpoint.save(Path(folder), tensors, step, facts)
            saved = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(row, checkpoint=saved)
