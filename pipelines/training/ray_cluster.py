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

import ray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.task import WorkerTask


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
        # sockets lie under this folder and their paths may not pass 107 bytes
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, train.num_workers * train.cpus_per_worker),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(Path(tempfile.gettempdir()) / "ray"),
        )
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


def run_workers(task: WorkerTask, train: Train, run_folder: Path) -> Path:
    """Run a training to its end on a started Ray; returns the folder of its last checkpoint.

    Args:
        run_folder: where checkpoints are kept; with some of an earlier call, the training goes on from the last.

    Raises:
        StageError: workers kept failing.
    """
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.use_gpu else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        return Path(cast(Checkpoint, trainer.fit().checkpoint).path)
    except TrainingFailedError as error:
        raise StageError(
            f"training {task.strategy} on {task.backbone} (seed {task.seed}) failed more than {train.max_failures} "
            f"times; the last error was: {root_cause(error)} Checkpoints are kept in {run_folder}: run the same "
            "command again to go on from the last one."
        ) from error


def _work(settings: dict[str, WorkerTask]) -> None:
    from pipelines.training.worker import train_worker  # with DeepSpeed, which only workers need

    train_worker(settings["task"])


def root_cause(error: BaseException) -> str:
    """The last line of what a worker raised."""
    failures = getattr(error, "worker_failures", None) or {}
    text = str(next(iter(failures.values()), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host:
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StageError(f"train.ray_address: no Ray cluster at {address} ({error}); is its head running?") from error
