"""Runs a command of a stage on a Ray cluster, wherever there is room for what it takes.

``python -m pipelines.run.on_cluster ADDRESS GPUS COMMAND...`` waits for a node with that many GPUs free (0, a share of
one, or whole ones) and a CPU, runs the command there in this folder, which the nodes share, and prints what it prints,
line by line. When this process ends, however it ends, so does the command. On a node that dies the command is lost and
is run again on another: a stage goes on from what it had written.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from pipelines.errors import StageError, run_stage
from pipelines.run.gpu_slots import end_with_parent

TRIES = 4
"""How often a command is run whose nodes die."""


def check_reachable(address: str) -> None:
    """Raises StageError where no cluster answers, for which Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host:
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> StageError:
    if "InvalidAuthToken" in str(error.__context__):  # Ray's own words are those for a head that is gone
        return StageError(
            f"train.ray_address: the Ray cluster at {address} asks for a token. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        )
    if address == "auto":
        return StageError(
            "train.ray_address: auto is the Ray cluster that this machine is of, and no Ray runs here. Start one, or "
            "join one, with `ray start`, or give the address of its head, as HEAD:6379."
        )
    return StageError(f"train.ray_address: no Ray cluster at {address} ({error}); is its head running?")


def connect(address: str) -> None:
    """Connects this process to a cluster. Raises StageError where there is none."""
    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise _no_cluster(address, error) from error


def run(command: Sequence[str], gpus: float) -> int:
    """The exit code of a command that is run on the cluster, as which it prints here.

    Raises:
        StageError: no node has so many GPUs, or the nodes that it ran on died, one after the other.
    """
    if gpus and not any(node["Alive"] and node["Resources"].get("GPU", 0) >= gpus for node in ray.nodes()):
        raise StageError(f"evaluate: {gpus:g} GPUs were asked for and no node of the Ray cluster has so many")
    job = cast(Any, ray.remote(num_cpus=1, num_gpus=gpus)(_Job))  # whose methods no type checker knows
    for left in reversed(range(TRIES)):
        try:
            for reference in job.remote().run.options(num_returns="streaming").remote(list(command), os.getcwd()):
                said: bytes | int = ray.get(reference)
                if isinstance(said, int):
                    return said
                sys.stdout.buffer.write(said)
                sys.stdout.flush()
        except RayTaskError as error:
            raise StageError(
                f"a node of the Ray cluster can't run {command[0]} in {os.getcwd()} ({error.cause}); the project, its "
                "environment and its results must lie on storage that all nodes share, at the same place"
            ) from error
        except RayError as error:
            reason = str(error).splitlines()[0]
            if not left:
                raise StageError(f"the Ray cluster lost this job {TRIES} times; the last time: {reason}") from error
            print(f"the Ray cluster lost this job ({reason}); running it again", flush=True)
    raise AssertionError("a command ends with its exit code or an error")


class _Job:
    """On a node. An actor: where a node loses its power Ray tells an actor's caller, while a task's waits on."""

    def run(self, command: list[str], folder: str) -> Iterator[bytes | int]:
        """The command's output, line by line, and then its exit code."""
        command = [sys.executable, "-m", "pipelines.run.gpu_slots", "0", *command]  # which ends with this process
        as_it_comes = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, cwd=folder, env=as_it_comes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            yield from (line for line in process.stdout)  # Ray sends to its generators, which a file doesn't take
        yield process.returncode


def main() -> None:
    address, gpus, *command = sys.argv[1:]
    end_with_parent()
    connect(address)
    sys.exit(run(command, float(gpus)))


if __name__ == "__main__":
    run_stage(main)
