"""What the memory costs vLLM in decoding: `.venv-vllm/bin/python -m benchmarks.vllm_decoding --help`.

One engine, whose steps are timed with the memory's hooks on the projections and without them, in turns of a few steps
each, so that whatever else the machine does meets both alike. On a CPU the process's own time is told, too: with one
thread (``OMP_NUM_THREADS=1``) it is what a step costs on a machine that has other work.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import OrderedDict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import report, run_benchmark
from pipelines.errors import StageError

TURN = 4


def main(
    base: Annotated[str, typer.Option(help="backbone folder")],
    adapter: Annotated[str, typer.Option(help="adapter folder")],
    batch: Annotated[list[int], typer.Option(help="sequences decoded together")] = [1, 8, 32],  # noqa: B006
    context: Annotated[int, typer.Option(help="tokens of each sequence before the steps that are timed")] = 64,
    steps: Annotated[int, typer.Option(help="timed steps, with and without each")] = 40,
    dtype: str = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Milliseconds of a decoding step with the memory and without it, medians."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model in this process, where its hooks can be taken off
    try:
        from vllm import LLM
    except ImportError:
        raise StageError("this Python has no vLLM: run .venv-vllm/bin/python (docs/vllm.md)") from None
    from deltamem_vllm.engine import engine_arguments
    from deltamem_vllm.plugin import register_classes

    register_classes()
    longest = context + 2 * steps + 64
    llm = LLM(**engine_arguments(base, adapter), dtype=dtype, enforce_eager=True, max_model_len=longest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = (_measured(llm, count, context, steps) for count in batch)
    report(rows, f"Decoding in vLLM, {Path(adapter).name}", device, out)


def _measured(llm, count: int, context: int, steps: int) -> dict:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=2 * steps + 32, ignore_eos=True, detokenize=False)
    engine, generator = llm.llm_engine, torch.Generator().manual_seed(0)
    names = [f"{count}-{number}" for number in range(count)]
    for name in names:
        prompt = torch.randint(100, 1000, (context,), generator=generator).tolist()
        engine.add_request(name, {"prompt_token_ids": prompt}, how)
    for _ in range(8):  # prompts, and what first steps alone pay
        engine.step()
    hooked = [module for module in _model(llm).modules() if module._forward_hooks]
    hooks = [module._forward_hooks for module in hooked]
    wall: dict[bool, list[float]] = {True: [], False: []}
    own: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * steps // TURN):
        remembers = turn % 2 == 0
        for module, its in zip(hooked, hooks, strict=True):
            module._forward_hooks = its if remembers else OrderedDict()
        for _ in range(TURN):
            began, used = time.perf_counter(), time.process_time()
            engine.step()
            wall[remembers].append(time.perf_counter() - began)
            own[remembers].append(time.process_time() - used)
    for module, its in zip(hooked, hooks, strict=True):
        module._forward_hooks = its
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    row: dict[str, float] = {"sequences": count}
    for what, seconds in {"step": wall, "process": own}.items():
        with_memory, without = (1e3 * statistics.median(seconds[remembers]) for remembers in (True, False))
        row |= {f"{what}, ms": with_memory, f"{what} without memory, ms": without}
        row[f"memory's share of {what}"] = with_memory / without - 1
    return row


def _model(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
