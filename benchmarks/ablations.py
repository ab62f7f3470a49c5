"""Trains and evaluates every cell of a configuration on this machine, in a few processes that live long.

    python -m benchmarks.ablations configs/ablations_facts.yaml --processes 8 --minutes 8

Every strategy gets its first seed before any gets its second, so that a run cut short has a whole table. Where not all
cells are done within the minutes, the same command goes on with the others; at the end it writes the report. The cells
are those of the workflow and so are their files. What differs: no Ray and no DeepSpeed, which start anew for every
cell, for longer than a cell of SmolLM2-135M trains; weights and Adam are float32, products on a GPU TensorFloat32.
On a GPU let CUDA's multi-process service share it (nvidia-cuda-mps-control -d).
"""

from __future__ import annotations

import argparse
import gc
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import run_benchmark
from deltamem.backbone.compiled_layers import compile_backbone
from deltamem.tools.measuring import peak_bytes
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone
from pipelines.config import FROZEN, Config, resolve_config
from pipelines.config.files import read_layers
from pipelines.evaluate import evaluate
from pipelines.preprocess import preprocess
from pipelines.report import write_report
from pipelines.run import parts
from pipelines.run.files import replacing, write_record
from pipelines.run.layout import Layout
from pipelines.run.provenance import provenance
from pipelines.strategies.kinds import recipe_of
from pipelines.training.curve import Curve
from pipelines.training.learning_rate import learning_rate

Cell = tuple[str, str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="+", help="a configuration, and others to lay over it")
    parser.add_argument("--processes", type=int, default=6, help="side by side (6)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--strategies", nargs="+", help="these of the configuration's only, or 'frozen'")
    parser.add_argument("--benchmarks", nargs="+", help="these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only")
    arguments = parser.parse_args()
    config = resolve_config(read_layers(arguments.config, {}), " + ".join(map(str, arguments.config)))
    config = only(config, arguments.benchmarks, arguments.seeds)
    prepare(config)
    run_cells(config, in_order(config, arguments.strategies), arguments.processes, arguments.minutes)
    parted = arguments.strategies or arguments.benchmarks or arguments.seeds
    if not parted and all(done(config, cell) for cell in in_order(config)):
        print(f"the report is {write_report(config)}", flush=True)


def only(config: Config, benchmarks: list[str] | None, seeds: list[int] | None) -> Config:
    """The configuration with these of its benchmarks and seeds, in this order; None: with all.

    Raises:
        RunConfigError: it has no such benchmark.
    """
    chosen: dict[str, Any] = {"seeds": seeds} if seeds else {}
    if benchmarks:
        chosen["benchmarks"] = {name: config.entry("benchmarks", name) for name in benchmarks}
    return config.model_copy(update=chosen)


def in_order(config: Config, strategies: list[str] | None = None) -> list[Cell]:
    """The frozen backbones, and then every strategy with its first seed before any with its second.

    Args:
        strategies: these only; None: all that are trained.

    Raises:
        RunConfigError: the configuration has no such strategy.
    """
    for name in strategies or ():
        if name != FROZEN:
            config.entry("strategies", name)
    cells = [(name, FROZEN, 0) for name in config.backbones]
    cells += sorted(parts.cells(config), key=lambda cell: config.seeds.index(cell[2]))
    return [cell for cell in cells if strategies is None or cell[1] in strategies]


def run_cells(config: Config, cells: list[Cell], processes: int, minutes: float) -> None:
    """Runs those cells that aren't done, in their order.

    Args:
        minutes: after so long no cell is begun.
    """
    waiting = [cell for cell in cells if not done(config, cell)]
    print(f"{len(waiting)} of {len(cells)} cells wait", flush=True)
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = {pool.submit(run_cell, config, cell): cell for cell in waiting}
        for number, job in enumerate(as_completed(running), start=1):
            if job.cancelled():
                continue
            seconds = time.perf_counter() - began
            error = job.exception()  # of one cell, and no reason to give up the others
            told = job.result() if error is None else f"failed, {type(error).__name__}: {error}"
            print(f"{number}/{len(waiting)} after {seconds:.0f} s: {running[job]}: {told}", flush=True)
            if seconds > 60 * minutes:
                for other in running:
                    other.cancel()  # those that run already go on to their end
    if left := [cell for cell in waiting if not done(config, cell)]:
        print(f"{len(left)} cells are left for the next time", flush=True)


def prepare(config: Config) -> None:
    """Backbones and episodes, where they aren't there."""
    layout = Layout(config)
    for name, entry in config.backbones.items():
        if not layout.backbone_record(name).exists():
            prepare_backbone(name, entry, layout.backbone(name))
        if not layout.data_manifest(name, "eval").exists():
            preprocess(config, name)


def done(config: Config, cell: Cell) -> bool:
    return all(Layout(config).evaluation(*cell, benchmark).exists() for benchmark in config.benchmarks)


def run_cell(config: Config, cell: Cell) -> str:
    """Trains a cell that isn't trained, and evaluates it; returns its memory effects in words."""
    if parts.needs_adapter(config, cell[1]) and not Layout(config).training_record(*cell).exists():
        train(config, cell)
        give_back()
    results = [evaluate(config, *cell, benchmark) for benchmark in config.benchmarks]
    give_back()
    effects = [result["effects"].get("memory_effect_nll", {}).get("value") for result in results]
    return ", ".join("no effect" if effect is None else f"memory effect {effect:.3f}" for effect in effects)


def give_back() -> None:
    """Leaves the GPU's memory to the other processes."""
    gc.collect()  # a graph's, which the objective holds in a circle
    torch.cuda.empty_cache()


def train(config: Config, cell: Cell) -> None:
    """One cell in this process: the recipe's episodes, batches and loss, and torch's AdamW."""
    layout, device = Layout(config), torch.device("cuda" if config.train.use_gpu else "cpu")
    recipe = recipe_of(config, config.cell(*cell))
    settings, began = recipe.cell.train, time.perf_counter()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.cell.seed)
    episodes, _ = recipe.episodes()
    schedule = recipe.schedule(episodes, workers=1)
    base, _ = load_backbone(recipe.folder, device=device)
    compile_backbone(base, settings.compile_backbone)
    recipe.prepare(base, episodes)
    objective: Any = recipe.objective(base)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, fused=device.type == "cuda")
    with replacing(layout.adapter(*cell)) as folder:
        curve, row = Curve(folder / "curve.csv", 0, recipe.sources, ()), {}
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, schedule.steps)
            batches = schedule.micro_batches(step, 0)
            for micro in batches:
                metrics = recipe.metrics(objective(recipe.collate(episodes, micro.groups, micro.beside).to(device)))
                (metrics["loss"] * micro.weight / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 9 or step + 1 == schedule.steps:  # a look waits for the device
                row = {"step": step + 1, **{name: float(value.detach()) for name, value in metrics.items()}}
                curve.add(row)
        weights = {name.removeprefix("adapter."): p.detach().float() for name, p in objective.named_parameters()}
        recipe.save(folder, weights)
        record = {"metrics": row, "wall_seconds": time.perf_counter() - began, "peak_memory_bytes": peak_bytes(device)}
        write_record(folder / "training.json", record | {"provenance": provenance(parts.train(config, *cell))})


if __name__ == "__main__":
    run_benchmark(main)
