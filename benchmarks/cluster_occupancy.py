"""Trainings and evaluations by Snakemake alone and through Ray: `python -m benchmarks.cluster_occupancy --help`.

The same four trainings and twelve evaluations on random weights twice, on as many cards: Snakemake gives them out
itself, then a Ray cluster started here for it does (`train.ray_address`). Meanwhile it is looked twice a second which
jobs run: trainings from when Ray has placed their worker, evaluations from their process's start, with a card or its
share of one each. Occupancy is the mean of what they hold over a run, from Snakemake's start to its end.

Without a CUDA GPU the cards are processors that Ray and Snakemake count: a rehearsal of what is given out, not of its
speed, in which an evaluation holds a whole one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
import torch
import typer

from benchmarks.measure import report, run_benchmark
from benchmarks.processes import free_port
from benchmarks.shapes import SHAPE_NAMES, SHAPES, known_shapes
from pipelines.backbone import prepare_backbone
from pipelines.config import Config, resolve_config
from pipelines.preprocess import preprocess
from pipelines.run import parts
from pipelines.run.gpu_slots import visible_gpus
from pipelines.run.layout import Layout

PROJECT = Path(__file__).parents[1]
SECONDS_BETWEEN = 0.5
UNDER_WAY = 64
"""Jobs that Snakemake starts at once where cards, and not processors, are what is short."""


class Look(NamedTuple):
    """What runs at a moment, in seconds since the start, and how busy the cards are (0 to 1; None: not known)."""

    seconds: float
    trainings: int
    evaluations: int
    busy: float | None


class Cards(NamedTuple):
    """What is given out: GPUs, or where there are none processors; and the share of one that an evaluation takes."""

    count: int
    gpu: bool
    share: float


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "tiny",
    cards: Annotated[int, typer.Option(help="0: every GPU, and without one two processors")] = 0,
    share: Annotated[float, typer.Option(help="of a GPU that an evaluation takes")] = 0.25,
    steps: Annotated[int, typer.Option(help="of each training")] = 50,
    papers: Annotated[int, typer.Option(help="that each evaluation asks about")] = 8,
    folder: Annotated[Path | None, typer.Option(help="for results and logs; a new one")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of what is held over time")] = None,
) -> None:
    """Total time and mean occupancy of the cards, the two ways side by side."""
    gpus = visible_gpus()
    given = Cards(cards or len(gpus) or 2, bool(gpus), share if gpus else 1.0)
    looks: dict[str, list[Look]] = {}
    with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as parent:
        rows = _rows(Path(parent).resolve(), given, shape, steps, papers, looks)
        kind = "GPUs" if given.gpu else "processors as cards"
        title = f"4 trainings, 12 evaluations, {shape}, {given.count} {kind}"
        try:
            report(rows, title, torch.device("cuda" if given.gpu else "cpu"), out)
        finally:  # what was seen of a run that failed shows where
            if plot and looks:
                _plot(looks, given, plot)


def _rows(
    folder: Path, cards: Cards, shape: str, steps: int, papers: int, looks: dict[str, list[Look]]
) -> Iterator[dict[str, Any]]:
    """A row of each way; what was seen meanwhile is left in ``looks``."""
    yield _run("Snakemake alone", configuration(folder, "alone", cards, shape, steps, papers, None), cards, looks)
    with ray_cluster(folder, cards) as address:
        yield _run("through Ray", configuration(folder, "ray", cards, shape, steps, papers, address), cards, looks)


def configuration(
    folder: Path, name: str, cards: Cards, shape: str, steps: int, papers: int, address: str | None
) -> Config:
    values = {
        "name": name, "results_dir": str(folder / "results"), "strategies": ["tsw", "ssw"], "seeds": [1, 2],
        "backbones": {shape: {"source": "random", "architecture": SHAPES[shape]}},
        "benchmarks": {
            "qasper": {"from": "qasper"}, "held_out": {"from": "held_out"},
            "facts": {"from": "facts", "facts": [4], "papers": papers},
        },
        "data": {"source": "generated", "max_written_tokens": 2048, "max_read_tokens": 256, "processes": 1,
                 "generated": {"train_papers": 16, "eval_papers": papers, "facts_per_paper": 4}},
        "train": {"max_steps": steps, "epochs": 10_000, "batch_size": 8, "micro_batch_size": 8, "num_workers": 1,
                  "use_gpu": cards.gpu, "measure_memory_every": 0, "ray_address": address},
        "evaluate": {"use_gpu": cards.gpu, "gpus": cards.share, "bootstrap_samples": 100, "max_new_tokens": 16},
        "register": {"live": False},
    }  # fmt: skip
    if not cards.gpu:
        values["train"] |= {"precision": "float32", "cpus_per_worker": 1}
    return resolve_config(values, "this benchmark")


def _run(way: str, config: Config, cards: Cards, looks: dict[str, list[Look]]) -> dict[str, Any]:
    """Has Snakemake run all jobs but the first two, which are done before."""
    layout, (backbone,) = Layout(config), config.backbones
    prepare_backbone(backbone, config.backbones[backbone], layout.backbone(backbone))
    preprocess(config, backbone)
    file = layout.results / f"{config.name}.json"
    file.write_text(config.to_json(), encoding="utf-8")
    # with Ray all jobs may be under way, for it is Ray that has them wait
    cores = UNDER_WAY if cards.gpu or config.train.ray_address else cards.count
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", str(cores)]
    command += ["--resources", f"gpus={cards.count if cards.gpu else 0}", "--configfile", str(file)]
    command += ["--directory", str(layout.results), *map(str, evaluations(config))]
    log = layout.results / f"{config.name}.log"
    print(f"{way}; follow it in {log}", flush=True)
    began = time.monotonic()
    with log.open("w") as said, Watch(cards) as watch:
        looks[way] = watch.looks
        ended = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - began
    if ended.returncode:
        raise RuntimeError(f"{way}: {log.read_text()[-3000:]}")
    busy = [look.busy for look in watch.looks if look.busy is not None]
    found = {"way": way, "seconds": seconds, "occupancy": occupancy(watch.looks, cards)}
    return found | {"utilisation": statistics.mean(busy) if busy else None}


def evaluations(config: Config) -> list[Path]:
    """The results of all adapters' evaluations, without those of the frozen backbone."""
    cells, layout = parts.cells(config), Layout(config)
    return [layout.evaluation(*cell, benchmark) for cell in cells for benchmark in config.benchmarks]


def occupancy(looks: Sequence[Look], cards: Cards) -> float:
    """The share of the cards that is held, on average."""
    return statistics.mean(look.trainings + look.evaluations * cards.share for look in looks) / cards.count


class Watch:
    """Looks at what runs below this process, now and then; a context manager."""

    def __init__(self, cards: Cards) -> None:
        self.looks: list[Look] = []
        self._cards, self._ended = cards, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN):
            found = [_kind(process) for process in psutil.Process().children(recursive=True)]
            seconds, busy = time.monotonic() - self._began, _busy() if self._cards.gpu else None
            self.looks.append(Look(seconds, found.count("training"), found.count("evaluation"), busy))


def _kind(process: psutil.Process) -> str | None:
    """Whether a process is a training's worker, which there is once Ray has placed it, or an evaluation."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if "RayTrainWorker" in process.name():
            return "training"
        if process.cmdline()[1:3] == ["-m", "pipelines.evaluate"]:
            return "evaluation"
    return None


def _busy() -> float:
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return statistics.mean(map(float, listed.stdout.split())) / 100


@contextlib.contextmanager
def ray_cluster(folder: Path, cards: Cards) -> Iterator[str]:
    """A Ray head with so many cards, and its address; at the end nothing of it is left."""
    own = Path(tempfile.mkdtemp(prefix="dm", dir="/tmp"))  # short, as the paths of sockets are limited
    port = free_port()
    counted = [f"--num-gpus={cards.count}", f"--num-cpus={UNDER_WAY}"] if cards.gpu else [f"--num-cpus={cards.count}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [*counted, f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={own}"]
    # for the head, and for all that is started here; without one, those of the user's other clusters would count
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}
    log = folder / "ray.log"
    with log.open("w") as said:
        head = psutil.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        while "Ray runtime started" not in log.read_text():
            if head.poll() is not None:
                raise RuntimeError(f"Ray didn't start: {log.read_text()}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        started = head.children(recursive=True) if head.poll() is None else []
        with contextlib.suppress(psutil.NoSuchProcess):  # where it didn't start
            head.terminate()
        head.wait()
        for left in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(own, ignore_errors=True)


def _plot(looks: dict[str, list[Look]], cards: Cards, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(looks), 1, figsize=(9, 5), sharex=True, squeeze=False)
    for axis, (way, seen) in zip(axes[:, 0], looks.items(), strict=True):
        seconds = [look.seconds for look in seen]
        held = [look.trainings for look in seen], [look.evaluations * cards.share for look in seen]
        axis.stackplot(seconds, *held, labels=["trainings", "evaluations"], step="post")
        if cards.gpu:
            axis.plot(seconds, [cards.count * (look.busy or 0) for look in seen], "k", lw=0.7, label="utilisation")
        axis.axhline(cards.count, color="grey", lw=0.8, ls="--")
        axis.set(title=way, ylabel="cards held", ylim=(0, cards.count * 1.15))
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
