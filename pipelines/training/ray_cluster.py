"""Ray around a training: the cluster that it runs on, and its workers from start to end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import cast

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.task import WorkerTask

_TRIES_TO_START = 8
console = Console(stderr=True, soft_wrap=True, markup=False)


@contextlib.contextmanager
def started_ray(train: Train) -> Generator[None]:
    """Connects to the cluster that the configuration names, or starts one here for the time inside.

    Raises:
        StageError: there is none, or it is too small.
    """
    try:
        _start(train)
        yield
    finally:
        ray.shutdown()


def _start(train: Train) -> None:
    if train.ray_address:
        _check_reachable(train.ray_address)
        ray.init(address=train.ray_address, log_to_driver=False)
    else:
        _start_here(max(os.cpu_count() or 1, train.num_workers * train.cpus_per_worker))
    have = ray.cluster_resources()
    for kind, wanted in (
        ("GPU", train.num_workers * train.gpus_per_worker if train.use_gpu else 0),
        ("CPU", train.num_workers * train.cpus_per_worker),
    ):
        if have.get(kind, 0) < wanted:
            remedy = "set train.use_gpu: false or lower train.num_workers" if kind == "GPU" else "lower num_workers"
            raise StageError(
                f"train: {wanted:g} {kind}s were asked for and Ray finds {have.get(kind, 0):g} on "
                f"{train.ray_address or 'this machine'}; {remedy}"
            )


def _start_here(cpus: int) -> None:
    """Ray gives its own processes 30 seconds to start, which is too little on a machine that is busy with others."""
    for left in reversed(range(_TRIES_TO_START)):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                # sockets lie under this folder and their paths may not pass 107 bytes
                _temp_dir=str(Path(tempfile.gettempdir()) / "ray"),
            )
            return
        except Exception as error:  # of no kind of its own
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            for started in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
            if not left:
                raise StageError(
                    f"Ray didn't start on this machine in {_TRIES_TO_START} tries; is it short of memory, or of "
                    "processors for all that runs on it?"
                ) from error


def run_workers(task: WorkerTask, train: Train, run_folder: Path) -> Path:
    """Run a training to its end on a started Ray; returns the folder of its last checkpoint.

    Whatever fails, Ray Train is started anew and goes on from the last checkpoint. It isn't asked to do that by
    itself, because it tells by the moment: a worker that dies while the workers connect to each other, or are handed
    what to run, would end the training at once.

    Args:
        run_folder: where checkpoints are kept; with some of an earlier call, the training goes on from the last.

    Raises:
        StageError: the training can't go on, as its workers say, or it failed more than ``train.max_failures`` times.
    """
    what = f"training {task.strategy} on {task.backbone} (seed {task.seed})"
    failures = 0
    while True:
        try:
            result = _trainer(task, train, run_folder).fit()
            return Path(cast(Checkpoint, result.checkpoint).path)
        except (TrainingFailedError, RayActorError) as error:
            failures += 1
            if told := _told(error):
                raise StageError(f"{what}: {told} Checkpoints of earlier steps are kept in {run_folder}.") from error
            if failures > train.max_failures:
                times = "once" if failures == 1 else f"{failures} times"
                raise StageError(
                    f"{what} failed {times} (train.max_failures: {train.max_failures}); the last error was: "
                    f"{root_cause(error)} Checkpoints are kept in {run_folder}: run the same command again to go on "
                    "from the last one."
                ) from error
            console.print(f"{what} failed ({root_cause(error)}); going on from the last checkpoint")


def _trainer(task: WorkerTask, train: Train, run_folder: Path) -> TorchTrainer:
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.use_gpu else {})
    return TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _work(settings: dict[str, WorkerTask]) -> None:
    from pipelines.training.worker import train_worker  # with DeepSpeed, which only workers need

    train_worker(settings["task"])


def root_cause(error: BaseException) -> str:
    """The last line of what a worker, or else Ray, raised."""
    text = str(next(iter(_worker_errors(error)), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _told(error: BaseException) -> StageError | None:
    """What a worker says that no further try would change."""
    return next((found for found in _worker_errors(error) if isinstance(found, StageError)), None)


def _worker_errors(error: BaseException) -> list[Exception]:
    return list(getattr(error, "worker_failures", {}).values())


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host:
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StageError(f"train.ray_address: no Ray cluster at {address} ({error}); is its head running?") from error
