"""Training throughput on real episodes, one process: `python -m benchmarks.training_throughput --help`.

Episodes per second of whole optimiser steps (write pass, read pass, backward, AdamW), data handling included. Needs
the folders that the stages backbone and preprocess write. Two ways of dealing with unequal lengths stand side by side:
episodes sorted by length inside a step (as training does it), and in the order drawn.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import report
from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.config import Train
from pipelines.shards import open_episodes
from pipelines.training.batches import Schedule, collate
from pipelines.training.objective import MemoryObjective


def main(
    backbone: Annotated[Path, typer.Option(help="backbone folder")],
    episodes: Annotated[Path, typer.Option(help="folder of training episodes")],
    strategy: Annotated[list[str], typer.Option(help="tsw, ssw or msw")] = ["tsw", "ssw", "msw"],  # noqa: B006
    micro_batch: Annotated[list[int], typer.Option(help="episodes per forward pass")] = [8, 32],  # noqa: B006
    batch: Annotated[int, typer.Option(help="episodes per optimiser step")] = 128,
    steps: Annotated[int, typer.Option(help="steps timed, after one to warm up")] = 4,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Episodes and tokens per second of training."""
    place, table, rows = torch.device(device), open_episodes(episodes), []
    files = sorted(backbone.glob("*.gguf"))
    gguf = {"gguf_file": files[0].name} if files else {}
    base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16, **gguf).to(place).eval()
    pad = AutoTokenizer.from_pretrained(backbone, **gguf).pad_token_id or 0
    for kind in strategy:
        for micro in micro_batch:
            for by_length in (True, False):
                model = get_delta_mem_model(base, DeltaMemConfig(strategy=kind))
                train = Train(batch_size=batch, micro_batch_size=micro, num_workers=1, epochs=99)
                schedule = Schedule(table, train, 0, 1)
                if not by_length:
                    schedule.lengths = [0] * len(table)
                measured = _measure(MemoryObjective(model, 0.01, 0.05), schedule, table, pad, steps, place)
                order = "length" if by_length else "drawn"
                rows.append({"strategy": kind, "micro-batch": micro, "order": order} | measured)
                model.unload()
    report(rows, f"Training throughput, {len(table)} episodes", place, out)


def _measure(objective, schedule, table, pad, steps, place):
    optimizer = torch.optim.AdamW(objective.parameters(), 2e-4, weight_decay=0.0, fused=place.type == "cuda")
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    episodes = tokens = 0
    for step in range(steps + 1):
        if step == 1:
            _wait(place)
            began, episodes, tokens = time.perf_counter(), 0, 0
        for groups in schedule.micro_batches(step, 0):
            batch = collate(table, groups, pad)
            episodes, tokens = episodes + len(groups), tokens + batch.tokens
            (objective(batch.to(place)).loss / schedule.accumulation).backward()
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
    typer.run(main)
