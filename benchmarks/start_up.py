"""How long a training and an evaluation take to begin: `python -m benchmarks.start_up --help`.

`python -m pipelines.train` on random weights, watched from outside until its first step is done, and then ended:

- **driver**: from the command until Ray's first process;
- **Ray**: until the process of Ray Train's controller is started;
- **controller**: until the first worker's is;
- **worker**: until the loop begins, with the process group, the backbone and DeepSpeed's engine made;
- **step**: the first step, kernels compiled or found compiled.

Then `python -m pipelines.evaluate` of the frozen backbone on one question, to its end. "CPU" are seconds of processors,
which tell more than those of a clock where others use them too. With `--beside` another checkout takes turns with this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.cluster_occupancy import Cards, configuration
from benchmarks.measure import report, run_benchmark
from benchmarks.shapes import SHAPE_NAMES, known_shapes
from pipelines.backbone import prepare_backbone
from pipelines.config import Config, resolve_config
from pipelines.preprocess import preprocess
from pipelines.run.gpu_slots import visible_gpus
from pipelines.run.layout import Layout
from pipelines.training.curve import read

PROJECT = Path(__file__).parents[1]
STRATEGY, SEED, BENCHMARK = "tsw", 1, "facts"


def main(
    shape: Annotated[str, typer.Option(callback=known_shapes, help=SHAPE_NAMES)] = "smollm2-135m",
    workers: Annotated[int, typer.Option(help="of the training, a GPU each where there are GPUs")] = 2,
    runs: Annotated[int, typer.Option(help="of each checkout, the first of which may fill caches")] = 3,
    beside: Annotated[Path | None, typer.Option(help="another checkout of this project")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Seconds by stage from the command to the first step done, and of a shortest evaluation."""
    device = torch.device("cuda" if visible_gpus() else "cpu")
    checkouts = [PROJECT, *([beside.resolve()] if beside else [])]
    with tempfile.TemporaryDirectory() as folder:
        config = _prepared(Path(folder).resolve(), shape, workers, device)
        report(_rows(config, Path(folder), checkouts, runs), f"start-up, {workers} workers, {shape}", device, out)


def _prepared(folder: Path, shape: str, workers: int, device: torch.device) -> Config:
    gpu = device.type == "cuda"
    plain = configuration(folder, "start_up", Cards(workers, gpu, 1.0), shape, 50, 2, None)
    values = plain.model_dump(mode="json", by_alias=True)
    values["train"] |= {"num_workers": workers, "batch_size": 4 * workers, "micro_batch_size": 4}
    values["data"] |= {"max_written_tokens": 512}
    values["register"] |= {"live": True}  # as it is where nothing else is said
    config = resolve_config(values, "this benchmark")
    layout = Layout(config)
    with device:  # on which the weights are drawn
        prepare_backbone(shape, config.backbones[shape], layout.backbone(shape))
    preprocess(config, shape)
    return config


def _rows(config: Config, folder: Path, checkouts: Sequence[Path], runs: int) -> Iterator[dict[str, Any]]:
    file = folder / "config.json"
    file.write_text(config.to_json(), encoding="utf-8")
    for run in range(1, runs + 1):
        for checkout in checkouts:
            which = {"checkout": "this" if checkout == PROJECT else checkout.name, "run": run}
            yield which | {"what": "training"} | _training(config, file, checkout)
            yield which | {"what": "evaluation"} | _evaluation(config, file, checkout)


def _training(config: Config, file: Path, checkout: Path) -> dict[str, Any]:
    (backbone,), layout = config.backbones, Layout(config)
    state = layout.train_state(backbone, STRATEGY, SEED)
    with _started(checkout, "train", file, backbone, SEED) as training:
        began = time.monotonic()
        while not (rows := [row for path in state.glob("run-*/curve.csv") for row in read(path) if row["seconds"]]):
            if training.poll() is not None:
                raise RuntimeError(f"the training ended before its first step:\n{_told(file)}")
            time.sleep(0.05)
        done = time.monotonic() - began
        row = _stages(training, done, float(rows[0]["seconds"]))
    shutil.rmtree(state)
    return row


def _stages(driver: psutil.Popen, done: float, step: float) -> dict[str, Any]:
    """What the processes of a training whose first step is done tell of the way there."""
    begun, cpu = {"driver": 0.0}, {"driver": _cpu_seconds(driver)}
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            kind, at = _kind(process.name()), process.create_time() - driver.create_time()
            begun[kind] = min(at, begun.get(kind, at))
            cpu[kind] = cpu.get(kind, 0.0) + _cpu_seconds(process)
    ends = [begun["Ray"], begun["controller"], begun["worker"], done - step, done]
    names = ["driver", "Ray", "controller", "worker", "step"]
    stages = {name: end - start for name, start, end in zip(names, [0.0, *ends], ends, strict=False)}
    return stages | {"all": done, "CPU": sum(cpu.values())} | {f"{kind}'s CPU": cpu[kind] for kind in begun}


def _kind(name: str) -> str:
    return {"ray::TrainController": "controller", "ray::RayTrainWorker": "worker"}.get(name.partition(".")[0], "Ray")


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _evaluation(config: Config, file: Path, checkout: Path) -> dict[str, Any]:
    (backbone,) = config.backbones
    began, before = time.monotonic(), os.times()
    with _started(checkout, "evaluate", file, backbone, 0, "--benchmark", BENCHMARK, "--limit", "1") as evaluation:
        if evaluation.wait():
            raise RuntimeError(f"the evaluation failed:\n{_told(file)}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return {"all": time.monotonic() - began, "CPU": cpu}


@contextlib.contextmanager
def _started(checkout: Path, stage: str, file: Path, backbone: str, seed: int, *more: str) -> Iterator[psutil.Popen]:
    """A stage of a checkout as a process, of which nothing is left at the end."""
    strategy = STRATEGY if stage == "train" else "frozen"
    command = [sys.executable, "-m", f"pipelines.{stage}", "--config", str(file), "--backbone", backbone]
    command += ["--strategy", strategy, "--seed", str(seed), *more]
    search = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    with file.with_suffix(".log").open("w") as said:
        process = psutil.Popen(
            command, cwd=checkout, env=os.environ | {"PYTHONPATH": search}, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # where it has ended by itself
                for left in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
            process.wait()


def _told(file: Path) -> str:
    return file.with_suffix(".log").read_text()[-3000:]


if __name__ == "__main__":
    run_benchmark(lambda: typer.run(main))
