"""The whole table of one machine by one command: `python -m benchmarks.machine OUT`.

Runs the benchmarks that the goals in RESULTS.md are read from, the most telling first, each a process of its own, for
as long as there is time: ten minutes suffice for one H200. Each leaves its numbers in OUT; called again with the same
OUT it goes on with what is missing. At the end stands every goal with what was measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import circumstances, run_benchmark
from pipelines.run.gpu_slots import visible_gpus

Rows = list[dict[str, Any]]
console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


@dataclass(frozen=True)
class Part:
    """A benchmark as it is run here.

    Attributes:
        seconds: what it takes on an H200, about.
        words: its module and options; with ``tiny`` those of a rehearsal on any machine.
        gpus: how many it needs.
    """

    seconds: int
    words: str
    tiny: str | None
    gpus: int = 1


_STEP = "training_step --strategy tsw"
_TINY_STEP = f"{_STEP} --shape tiny --written 32 --read 8 --repeats 1"
_DECODE = "generation --no-eager --strategy tsw"
_SCALING = "scaling --workers 1 --workers 2"
PARTS = {
    "scan": Part(25, "scan --states 1 --tokens 8192 --tokens 131072", None),
    "step": Part(35, f"{_STEP} --repeats 3", _TINY_STEP),
    "decode": Part(
        130,
        f"{_DECODE} --compiled --prefill 8192 --repeats 3",
        f"{_DECODE} --shape tiny --prefill 16 --context 16 --tokens 2 --repeats 1",
    ),
    "small": Part(
        180,
        'small_steps --work short --work evidence --way "graphed, layers compiled, DeepSpeed"',
        "small_steps --shape tiny --work short --work evidence --way plain --steps 1 --scale 0.05",
    ),
    "start": Part(100, "start_up --workers 1 --runs 2", "start_up --shape tiny --workers 1 --runs 1"),
    "compiled": Part(60, f"{_STEP} --compiled --repeats 3", _TINY_STEP),
    "workers": Part(90, _SCALING, f"{_SCALING} --shape tiny --written 32 --read 8 --batch 2 --steps 1", gpus=2),
}
"""By the names of their files, in the order in which they are run."""


class Goal(NamedTuple):
    """A figure to reach: which part it is read from, how, and whether more is better."""

    what: str
    part: str
    of: Callable[[Rows], float]
    goal: float
    more: bool = False


def _one(rows: Rows, value: str, **wanted: Any) -> float:
    """A value of the last row that is as wanted. Raises LookupError where there is none, or it wasn't measured."""
    found = [row[value] for row in rows if all(row.get(key) == wish for key, wish in wanted.items())]
    if not found or not isinstance(found[-1], int | float):
        raise LookupError(value)
    return found[-1]


def _decode(rows: int, value: str) -> Callable[[Rows], float]:
    what = f"decode in slots, batch {rows} (tok/s)"
    return lambda found: _one(found, value, what=what, **{"with": "tsw"})


GOALS = (
    Goal("scan forward, T = 8,192, µs", "scan", lambda rows: _one(rows, "forward", T=8192, scan="triton"), 43),
    Goal("scan forward, T = 131,072, µs", "scan", lambda rows: _one(rows, "forward", T=131072, scan="triton"), 170),
    Goal("step 8,192 + 512 over its backbone", "step", lambda rows: _one(rows, "over backbone", strategy="tsw"), 1.10),
    Goal("the same compiled, s", "compiled", lambda rows: _one(rows, "seconds", strategy="tsw"), 0.45),
    Goal(
        "the same over its compiled backbone",
        "compiled",
        lambda rows: _one(rows, "over backbone", strategy="tsw"),
        1.08,
    ),
    Goal(
        "prefill over its backbone",
        "decode",
        lambda rows: _one(
            [row for row in rows if row["what"].startswith("prefill")], "cost over backbone", **{"with": "tsw"}
        ),
        1.03,
    ),
    Goal("decoding, batch 1, tok/s", "decode", _decode(1, "value"), 250, True),
    Goal("decoding, batch 1, over its backbone", "decode", _decode(1, "cost over backbone"), 1.05),
    Goal("decoding, batch 32, tok/s", "decode", _decode(32, "value"), 3000, True),
    Goal("short step of a small backbone, ms", "small", lambda rows: _one(rows, "ms a step", work="short"), 80),
    Goal("evidence, episodes/s", "small", lambda rows: _one(rows, "episodes/s", work="evidence"), 400, True),
    Goal("from the command to the first step, s", "start", lambda rows: _one(rows, "all", what="training"), 20),
    Goal("two workers, efficiency", "workers", lambda rows: _one(rows, "efficiency", workers=2), 0.95, True),
)


def main(
    out: Annotated[Path, typer.Argument(help="folder for the numbers; what lies there already is not run again")],
    minutes: Annotated[float, typer.Option(help="no part begins that would last longer")] = 10.0,
    tiny: Annotated[bool, typer.Option(help="rehearse on a tiny shape, on any machine")] = False,
) -> None:
    """Every figure that has a goal, as far as this machine and the time allow."""
    out = out / "rehearsal" if tiny else out  # whose numbers are none of this machine's
    out.mkdir(parents=True, exist_ok=True)
    ends, gpus = time.monotonic() + 60 * minutes, len(visible_gpus())
    left_out = {}
    for name, part in PARTS.items():
        file = out / f"{name}.json"
        left = ends - time.monotonic()
        words = part.tiny if tiny else part.words
        if file.exists():
            console.print(f"{name}: measured already, {file}")
        elif words is None or (not tiny and gpus < part.gpus):
            left_out[name] = f"needs {part.gpus} GPU{'s' if part.gpus > 1 else ''}"
        elif left < (1 if tiny else part.seconds):
            left_out[name] = f"takes about {part.seconds} s, and {max(0, left):.0f} are left"
        elif reason := _run(name, words, file, left):
            left_out[name] = reason
        if name in left_out:
            console.print(f"{name}: {left_out[name]}")
    Console(width=160).print(_table(out, left_out, tiny))


def _run(name: str, words: str, file: Path, seconds: float) -> str | None:
    """Runs one part; returns why it has no numbers, None where it has."""
    console.print(f"{name}: python -m benchmarks.{words}")
    partial, log = file.with_suffix(".partial"), file.with_suffix(".log")
    module, *options = shlex.split(words)
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(partial)]
    with log.open("w", encoding="utf-8") as told:
        running = subprocess.Popen(command, stdout=told, stderr=told, start_new_session=True)
    try:
        returned = running.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"wasn't done when the time was over; see {log}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it started and left: Ray's processes, compilers
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    if returned:
        return f"ended with {returned}; see {log}"
    partial.replace(file)
    return None


def _table(out: Path, left_out: dict[str, str], tiny: bool) -> Table:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(title=", ".join(f"{key} {value}" for key, value in circumstances(device).items()))
    for column in ("what", "goal", "here", ""):
        table.add_column(column, justify="right" if column in ("goal", "here") else "left")
    for goal in GOALS:
        bound = f"{'≥' if goal.more else '≤'} {goal.goal:g}"
        file = out / f"{goal.part}.json"
        try:
            value = goal.of(json.loads(file.read_text(encoding="utf-8"))["rows"])
        except (OSError, LookupError):
            table.add_row(goal.what, bound, "", left_out.get(goal.part, "not measured"))
            continue
        met = value >= goal.goal if goal.more else value <= goal.goal
        table.add_row(goal.what, bound, f"{value:.4g}", "rehearsed" if tiny else "met" if met else "missed")
    return table


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
