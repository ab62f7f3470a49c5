"""Timing and the circumstances of a measurement."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from deltamem.errors import DeltaMemError
from pipelines.errors import StageError, run_stage


def run_benchmark(program: Callable[[], object]) -> None:
    """Run a benchmark's command line; what its user can act on is told in a sentence, without a traceback."""

    def told() -> None:
        try:
            program()
        except DeltaMemError as error:
            raise StageError(str(error)) from error

    run_stage(told)


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 5, warmup: int = 2) -> float:
    """Median wall time of a call, with the device idle before and after."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_gib(function: Callable[[], Any], device: torch.device) -> float:
    """Peak GPU memory of a call in GiB (0 on a CPU)."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    _wait(device)
    return torch.cuda.max_memory_allocated() / 2**30


def circumstances(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    launch = {"launch": f"{_launch_microseconds(device):.1f} µs"} if device.type == "cuda" else {}
    return {"device": name, **versions, **launch}


def _launch_microseconds(device: torch.device, count: int = 500) -> float:
    """How long the host takes to issue an operation: what bounds steps of many small ones, and differs by host."""
    value = torch.zeros(1, device=device)
    for _ in range(2):
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            value.add_(1)
        issued = time.perf_counter() - began
    _wait(device)
    return 1e6 * issued / count


def report(rows: Iterable[dict[str, Any]], title: str, device: torch.device, out: Path | None) -> list[dict[str, Any]]:
    """Tell and write down each row as it is measured, so that nothing is lost with a run cut short; then a table."""
    around, measured, errors = circumstances(device), [], Console(stderr=True, width=200, highlight=False)
    for row in rows:
        measured.append(row)
        errors.print(", ".join(f"{key} {value}" for key, value in _in_words(row).items() if value))
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"title": title, "circumstances": around, "rows": measured}, indent=1) + "\n")
    table = Table(title=f"{title} ({', '.join(f'{k} {v}' for k, v in around.items())})")
    told = [_in_words(row) for row in measured]
    columns = list(dict.fromkeys(key for row in told for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(measured[0].get(column), str) else "right")
    for row in told:
        table.add_row(*(row.get(column, "") for column in columns))
    Console(width=200).print(table)
    return measured


def _in_words(row: dict[str, Any]) -> dict[str, str]:
    """A row as it is told: an estimate's interval, which has columns of its own, stands behind it in brackets."""
    told = {key: _show(value) for key, value in row.items()}
    for key in row:
        low, high = (told.pop(f"{key} {end}", "") for end in ("low", "high"))
        if low and high:
            told[key] += f" \\[{low}, {high}]"
    return told


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
