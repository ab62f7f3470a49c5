"""Gives jobs that run side by side on one machine GPUs of their own.

Snakemake counts GPUs but doesn't say which ones a job may use. ``python -m pipelines.gpu_slots N COMMAND...``
waits for N free GPUs, runs the command with CUDA_VISIBLE_DEVICES set to them, and ends with its exit code. A
GPU is held by a file lock, which the system takes back from a job that dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.5


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use: CUDA_VISIBLE_DEVICES where set, else what nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


@contextlib.contextmanager
def claim(count: int, folder: Path | None = None) -> Iterator[list[str]]:
    """Holds ``count`` GPUs, waiting until so many are free. At most as many as there are can be held."""
    folder = folder or Path(tempfile.gettempdir()) / f"deltamem-gpu-slots-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    wanted = min(count, len(gpus))
    while True:
        with contextlib.ExitStack() as held:
            mine: list[str] = []
            for gpu in gpus:
                if len(mine) < wanted and _try_lock(held, folder / gpu):
                    mine.append(gpu)
            if len(mine) == wanted:
                yield mine
                return
        time.sleep(POLL_SECONDS)


def _try_lock(held: contextlib.ExitStack, path: Path) -> bool:
    try:
        held.enter_context(FileLock(f"{path}.lock", timeout=0))
    except Timeout:
        return False
    return True


def main(arguments: list[str]) -> int:
    count, command = int(arguments[0]), arguments[1:]
    if count == 0:
        os.execvp(command[0], command)
    with claim(count) as gpus:
        return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
