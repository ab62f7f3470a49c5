"""TODO pipelines/training/ray_cluster.py."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import ray

from pipelines.config import Cell
from pipelines.errors import StageError


def _start_ray(cell: Cell) -> None:
    """Connect to the cluster that the configuration names, or start one here, and check that it is big enough."""
    train = cell.train
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
            logging_level="WARNING",
            _temp_dir=str(Path(tempfile.gettempdir()) / "ray"),
        )
    have = ray.cluster_resources()
    for kind, wanted in (
        ("GPU", train.num_workers * train.gpus_per_worker if train.use_gpu else 0),
        ("CPU", train.num_workers * train.cpus_per_worker),
    ):
        if have.get(kind, 0) < wanted:
            ray.shutdown()
            remedy = "set train.use_gpu: false or lower train.num_workers" if kind == "GPU" else "lower num_workers"
            raise StageError(
                f"train: {wanted:g} {kind}s were asked for and Ray finds {have.get(kind, 0):g} on "
                f"{train.ray_address or 'this machine'}; {remedy}"
            )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host:
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StageError(f"train.ray_address: no Ray cluster at {address} ({error}); is its head running?") from error


def _root_cause(error: BaseException) -> str:
    """The last line of what a worker raised."""
    failures = getattr(error, "worker_failures", None) or {}
    text = str(next(iter(failures.values()), error)).strip()
    return text.splitlines()[-1] if text else type(error).__name__
