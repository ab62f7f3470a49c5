"""The training stage as it is meant, on every GPU of a machine: `python -m benchmarks.eight_gpus --help`.

Ray Train, DeepSpeed ZeRO-2 and `configs/paper.yaml`'s recipe on random weights of a real shape, drawn on the device,
and random episodes of the paper's lengths. With N workers, one a GPU:

1. TSW on N. A worker is killed once there is a checkpoint, and the training recovers; later another, which ends it.
2. N/2 workers go on from N's last checkpoint; beside them, on the other GPUs, N/4 … 1 train the same: scaling.
3. The other strategies on N.

A row tells a training's step (median, those left out that warm up, are profiled, or come after a restart), its tokens a
second, the first worker's peak memory, the time until the first step is done, and how much of a step collectives take:
in all, and while nothing is computed (waiting for the slowest worker included). A CPU takes `--shape tiny --written 64
--read 16 --workers 8`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
import torch
import typer

from benchmarks.measure import report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, SHAPES, known_shapes
from pipelines.backbone import prepare_backbone
from pipelines.config import Config, load_config, resolve_config
from pipelines.data.shards import write_manifest, write_shards
from pipelines.run.gpu_slots import visible_gpus
from pipelines.run.layout import Layout
from pipelines.training import checkpoint
from pipelines.training.curve import read

PAPER = Path(__file__).parents[1] / "configs/paper.yaml"
SEED, CHECKPOINT_EVERY = 42, 2
WARM_UP = 3
"""Steps after a start that aren't timed: two in which kernels are compiled, and one that is profiled."""
KILLED_AT, STOPPED_AT, STEPS = 5, 8, 12


class Place(NamedTuple):
    """What the trainings run on, and what they run."""

    config: Config
    folder: Path
    gpus: list[str]


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "qwen3-4b",
    strategy: Annotated[list[str], typer.Option(help="of which the first is scaled")] = ["tsw", "ssw", "msw"],  # noqa: B006
    written: Annotated[int, typer.Option(help="tokens written")] = 8192,
    read_: Annotated[int, typer.Option("--read", help="tokens read, the last 32 of them the answer")] = 512,
    workers: Annotated[int, typer.Option(help="0: one for every GPU")] = 0,
    folder: Annotated[Path | None, typer.Option(help="for backbone, episodes and checkpoints; a new one")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Step time, memory, communication, scaling, recovery, and a checkpoint gone on with by half the workers."""
    gpus = visible_gpus()
    device, count = torch.device("cuda" if gpus else "cpu"), workers or len(gpus)
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as parent:
        where = Path(parent).resolve()
        place = Place(_config(shape, strategy, bool(gpus), where), where, gpus)
        _prepare(place.config, shape, written, read_, device)
        report(_rows(place, strategy, count), f"{count} workers, {shape}, {written} + {read_} tokens", device, out)


def _config(shape: str, strategies: list[str], gpu: bool, folder: Path) -> Config:
    paper = load_config(PAPER)
    values = {
        "name": "many_gpus", "results_dir": str(folder / "results"), "strategies": strategies, "seeds": [SEED],
        "backbones": {shape: {"source": "random", "architecture": SHAPES[shape], "dtype": "bfloat16"}},
        "benchmarks": ["qasper"], "data": {"source": "generated"}, "register": {"live": False},
        "train": paper.train.model_dump() | {"use_gpu": gpu, "checkpoint_every": CHECKPOINT_EVERY, "max_failures": 1,
                                             "measure_memory_every": 0, "profile_steps": 1},
    }  # fmt: skip
    if not gpu:
        values["train"] |= {"precision": "float32", "cpus_per_worker": 1}
    return resolve_config(values, "this benchmark")


def _prepare(config: Config, shape: str, written: int, read_: int, device: torch.device) -> None:
    """The backbone, and episodes for every step that any training takes."""
    layout = Layout(config)
    with device:  # on which the weights are drawn
        prepare_backbone(shape, config.backbones[shape], layout.backbone(shape))
    generator, vocabulary = torch.Generator().manual_seed(SEED), SHAPES[shape]["vocab_size"]

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    rows = (
        {
            "paper_id": f"p{n}", "question_id": f"q{n}", "answer_type": "", "references": [], "messages": [],
            "question": "", "answer": "", "source": "papers", "prompt": [], "context_ids": ids(written),
            "segment_ids": [i // 256 for i in range(written)], "question_ids": ids(read_ - min(32, read_ // 2)),
            "answer_ids": ids(min(32, read_ // 2)),
        }
        for n in range(STEPS * config.train.batch_size)
    )  # fmt: skip
    data = layout.data(shape, "train")
    data.mkdir(parents=True)
    write_manifest(data, {"shards": write_shards(rows, data, 2**30)})


def _rows(place: Place, strategies: list[str], count: int) -> Iterator[dict[str, Any]]:
    first, *others = strategies
    with Training(place, first, count, place.gpus[:count], STEPS) as training:
        training.wait_for(KILLED_AT)
        recovered = training.recovers_from(training.kill_a_worker())
        training.wait_for(STOPPED_AT)
        training.kill_a_worker()
        training.ends(well=False)
        yield training.row() | {"recovered after s": recovered}
    sizes, taken = [count >> n for n in range(1, count.bit_length())], 0
    with contextlib.ExitStack() as stack:
        scaled = []
        for number, size in enumerate(sizes):
            steps = STEPS if number == 0 else WARM_UP + 2  # the first goes on, and the others start
            gpus = place.gpus[taken : taken + size]
            scaled.append(stack.enter_context(Training(place, first, size, gpus, steps)))
            taken += size
        while any([training.goes_on() for training in scaled]):
            time.sleep(0.05)
        for training in scaled:
            training.ends(well=True)
            yield training.row()
    for strategy in others:
        with Training(place, strategy, count, place.gpus[:count], WARM_UP + 3) as training:
            training.ends(well=True)
            yield training.row()


class Training:
    """A training in a process of its own; a context manager, at whose end the process is ended.

    One with as many steps as another of the same strategy goes on from its checkpoints.
    """

    def __init__(self, place: Place, strategy: str, workers: int, gpus: list[str], steps: int):
        values = place.config.model_dump(mode="json", by_alias=True)
        values["train"] |= {"num_workers": workers, "max_steps": steps}
        if steps != STEPS:  # shares the backbone and the episodes, and nothing else
            values["name"] = f"{values['name']}-{strategy}-{workers}"
            shared, own = Layout(place.config).root, place.folder / "results" / values["name"]
            own.mkdir()
            for name in ("backbones", "data"):
                (own / name).symlink_to(shared / name)
        self.config = resolve_config(values, "this benchmark")
        self.strategy, self.workers, self.gpus = strategy, workers, gpus
        self.cell = next(iter(self.config.backbones)), strategy, SEED
        self.layout, self.file = Layout(self.config), place.folder / f"{strategy}-{workers}-{steps}.json"
        self.first_seconds: float | None = None
        self.starts: list[int] = []

    def __enter__(self) -> Training:
        self.file.write_text(self.config.to_json(), encoding="utf-8")
        backbone, strategy, seed = self.cell
        command = [sys.executable, "-m", "pipelines.train", "--config", str(self.file), "--backbone", backbone]
        command += ["--strategy", strategy, "--seed", str(seed)]
        if self.gpus:
            command = ["env", f"CUDA_VISIBLE_DEVICES={','.join(self.gpus)}", *command]
        self.done_before, self.began = self._steps(), time.monotonic()
        self.starts.append(self.done_before)
        self.log = self.file.with_suffix(".log").open("w")
        self.process = psutil.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # where it has ended by itself
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self.log.close()

    def wait_for(self, steps: int) -> None:
        """Until so many steps are done."""
        self._until(lambda: self._steps() >= steps)

    def kill_a_worker(self) -> float:
        """Kills one; returns when."""
        workers = [p for p in self.process.children(recursive=True) if "RayTrainWorker" in p.name()]
        workers[-1].kill()
        return time.monotonic()

    def recovers_from(self, killed: float) -> float:
        """Waits until a step is done again; returns the seconds since the kill."""
        time.sleep(0.5)  # a step that was just being noted
        lost = self._steps()
        self._until(lambda: self._steps() != lost)
        time.sleep(0.2)  # until the curve is written anew
        again = min(lost, self._steps())  # the curve is cut back to the checkpoint, if there was none at its end
        self.starts.append(again)
        self._until(lambda: self._steps() > again)
        return time.monotonic() - killed

    def ends(self, well: bool) -> None:
        """Waits for the end, which has to be such a one."""
        while self.goes_on():
            time.sleep(0.05)
        if (self.process.wait() == 0) is not well:
            raise RuntimeError(f"{self.process.args} ended otherwise than it should:\n{self._told()}")

    def row(self) -> dict[str, Any]:
        rows = read(self._curve())
        timed = [row for row in rows if self._is_timed(int(row["step"]))] or rows[-1:]
        found = {
            "strategy": self.strategy, "workers": self.workers, "steps": f"{self.starts[0] + 1}–{rows[-1]['step']}",
            "step s": statistics.median(float(row["seconds"]) for row in timed),
            "tokens/s": statistics.median(float(row["tokens_per_second"]) for row in timed),
            "first step done after s": self.first_seconds,
        }  # fmt: skip
        record = checkpoint.record(checkpoint.newest(running)) if (running := self._running()) else self._record()
        found |= {"peak GiB": record["peak_memory_bytes"] / 2**30}
        found |= {"like one run": record["like_one_run"]} if not running else {}
        return found | self._communication()

    def _record(self) -> dict[str, Any]:
        return json.loads(self.layout.training_record(*self.cell).read_text())

    def _is_timed(self, step: int) -> bool:
        return step > self.starts[0] and not any(start < step <= start + WARM_UP for start in self.starts)

    def _communication(self) -> dict[str, float]:
        trace = self.layout.trace(*self.cell)
        return communication(json.loads(trace.read_text())["traceEvents"]) if trace.exists() else {}

    def _running(self) -> Path | None:
        return next(self.layout.train_state(*self.cell).glob("run-*"), None)

    def _curve(self) -> Path:
        """Of the training while it runs, or of the adapter that it made."""
        running = self._running()
        return running / "curve.csv" if running else self.layout.curve(*self.cell)

    def _steps(self) -> int:
        rows = read(self._curve())
        return int(rows[-1].get("step") or 0) if rows else 0

    def goes_on(self) -> bool:
        """Whether it hasn't ended; notes when its first step is done."""
        if self.first_seconds is None and self._steps() > self.done_before:
            self.first_seconds = time.monotonic() - self.began
        return self.process.poll() is None

    def _until(self, come: Callable[[], bool]) -> None:
        while not come():
            if not self.goes_on():
                raise RuntimeError(f"{self.process.args} ended too early:\n{self._told()}")
            time.sleep(0.05)

    def _told(self) -> str:
        return Path(self.log.name).read_text()[-3000:]


def communication(events: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of a profiled step's time: in which collectives run, and in which nothing else does."""
    spans = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in spans if event["name"].startswith("ProfilerStep")]
    kernels = [event for event in spans if event.get("cat") == "kernel"]
    if kernels:
        collectives = [event for event in kernels if "nccl" in event["name"]]
        others = [event for event in kernels if "nccl" not in event["name"]]
    else:  # on a CPU the thread that computes is the one that waits
        collectives, others = [event for event in spans if event["name"].startswith("gloo:")], []
    whole = sum(event["dur"] for event in steps)
    both, alone = _covered(collectives + others), _covered(others)
    return {"collectives": _covered(collectives) / whole, "… alone": (both - alone) / whole}


def _covered(events: list[dict[str, Any]]) -> float:
    """The time in which any of some events runs."""
    total, end = 0.0, float("-inf")
    for start, last in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, last - max(start, end))
        end = max(end, last)
    return total


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
