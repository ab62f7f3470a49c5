"""Ray around a training: the cluster that it runs on, and its workers from start to end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import cast

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from rich.console import Console

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.run import on_cluster
from pipelines.training import checkpoint
from pipelines.training.entry import work
from pipelines.training.task import WorkerTask

_TRIES_TO_START = 8
_NODE_SECONDS = 600
"""How long a training waits for nodes that were lost."""
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
        on_cluster.connect(train.ray_address)
    else:
        _start_here(max(os.cpu_count() or 1, train.num_workers * train.cpus_per_worker))
    if lacking := _lacking(train, ray.cluster_resources()):
        remedy = "set train.use_gpu: false or lower train.num_workers" if "GPU" in lacking else "lower num_workers"
        raise StageError(f"train: {lacking} on {train.ray_address or 'this machine'}; {remedy}")


def _lacking(train: Train, have: Mapping[str, float]) -> str:
    """What of Ray's resources doesn't suffice for all workers, in words; empty where they do."""
    for kind, wanted in {name: train.num_workers * each for name, each in _resources_per_worker(train).items()}.items():
        if have.get(kind, 0) < wanted:
            return f"{wanted:g} {kind}s were asked for and Ray finds {have.get(kind, 0):g}"
    return ""


def _resources_per_worker(train: Train) -> dict[str, float]:
    gpus: dict[str, float] = {"GPU": train.gpus_per_worker} if train.use_gpu else {}
    return gpus | {"CPU": train.cpus_per_worker}


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
            ray.shutdown()  # which doesn't know what a start that failed has left running
            for started in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
            if "timed out during startup" not in str(error):
                raise
            if not left:
                raise StageError(
                    f"Ray didn't start on this machine in {_TRIES_TO_START} tries; is it short of memory, or of "
                    "processors for all that runs on it?"
                ) from error


def run_workers(task: WorkerTask, train: Train, run_folder: Path) -> Path:
    """Run a training to its end on a started Ray; returns the folder of its last checkpoint.

    Whatever fails, Ray Train is started anew and goes on from the last checkpoint that is whole. It isn't asked to do
    that by itself, because it tells by the moment: a worker that dies while the workers connect to each other, or are
    handed what to run, would end the training at once. And it trusts whatever checkpoint it has noted last.

    Args:
        run_folder: where checkpoints are kept; with some of an earlier call, by any number of workers, the training
            goes on from the last.

    Raises:
        StageError: the training can't go on, as its workers say, the cluster has become too small for it, or it failed
            more than ``train.max_failures`` times.
    """
    what = f"training {task.strategy} on {task.backbone} (seed {task.seed})"
    failures = 0
    while True:
        saved = checkpoint.newest(run_folder)
        _drop_tries(run_folder, saved)
        try:
            _wait_for_nodes(train, what)
            _trainer(task, saved, train, run_folder).fit()
            return cast(Path, checkpoint.newest(run_folder))
        except (TrainingFailedError, RayActorError) as error:
            if _found_no_room(error):
                continue
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


def _drop_tries(run_folder: Path, saved: Path | None) -> None:
    """Removes what earlier tries left, but for the checkpoint to go on from."""
    for folder in run_folder.glob("try-*"):
        if saved is None or saved.parent != folder:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_nodes(train: Train, what: str) -> None:
    """Waits for nodes that were lost. Raises StageError when they don't come back; says so where others fill them."""
    deadline = time.monotonic() + _NODE_SECONDS
    while lacking := _lacking(train, ray.cluster_resources()):
        if time.monotonic() > deadline:
            raise StageError(
                f"{what}: {lacking} for {_NODE_SECONDS} s; a node seems to be lost. Bring it back, or lower "
                "train.num_workers, and run the same command again: it goes on from the last checkpoint."
            )
        time.sleep(1)
    if lacking := _lacking(train, ray.available_resources()):
        console.print(f"{what} waits for room on the cluster ({lacking} free)")


def _trainer(task: WorkerTask, saved: Path | None, train: Train, run_folder: Path) -> TorchTrainer:
    """One try. Its folder is new: what Ray Train finds noted in one of another try it would go on from by itself."""
    return TorchTrainer(
        work,
        train_loop_config={"task": task, "saved": saved},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.use_gpu, resources_per_worker=_resources_per_worker(train)
        ),
        run_config=RunConfig(
            name=Path(tempfile.mkdtemp(prefix="try-", dir=run_folder)).name,
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _found_no_room(error: BaseException) -> bool:
    """Whether others had the GPUs or CPUs for all the time that Ray Train waits: no failure, it is started again."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def root_cause(error: BaseException) -> str:
    """The last line of what a worker, or else Ray, raised."""
    text = str(next(iter(_worker_errors(error)), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def _told(error: BaseException) -> StageError | None:
    """What a worker says that no further try would change."""
    return next((found for found in _worker_errors(error) if isinstance(found, StageError)), None)


def _worker_errors(error: BaseException) -> list[Exception]:
    return list(getattr(error, "worker_failures", {}).values())
