"""Gives jobs that run side by side on one machine GPUs, or shares of GPUs, of their own.

Snakemake counts GPUs but doesn't say which ones a job may use. ``python -m pipelines.run.gpu_slots N COMMAND...``
waits for N thousandths of GPUs and becomes the command, with CUDA_VISIBLE_DEVICES set to them. Less than 1000 is a
share of one GPU. What a job holds is a locked file, which the system unlocks when the job ends, however it ends. The
command ends when what started this process does: a Snakemake that is killed leaves no trainings running.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
WHOLE = 1000
"""A GPU in the unit that jobs are counted in: Snakemake's resources are whole numbers."""


def thousandths(gpus: float) -> int:
    """Whole GPUs, or 1/k of one, as a number of which k make no more than a GPU and k + 1 more."""
    return WHOLE * int(gpus) if gpus >= 1 else WHOLE // round(1 / gpus)


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
def claim(wanted: int, folder: Path | None = None) -> Generator[list[str]]:
    """Holds ``wanted`` thousandths of GPUs, waiting until they are free; at most as many as there are.

    A share goes to the fullest GPU that has room for it, so that whole ones stay free.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"deltamem-gpu-slots-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    count, share = min(max(1, wanted // WHOLE), len(gpus)), min(wanted, WHOLE)
    with contextlib.ExitStack() as held:
        while True:
            with FileLock(folder / "claiming.lock"):
                taken = {gpu: _taken(folder, gpu) for gpu in gpus}
                room = [gpu for gpu in gpus if taken[gpu] + share <= WHOLE]
                if len(room) >= count:
                    mine = sorted(room, key=lambda gpu: -taken[gpu])[:count]
                    for gpu in mine:
                        held.enter_context(_held(folder / f"{gpu}.{share}.{uuid.uuid4().hex}.held"))
                    break
            time.sleep(POLL_SECONDS)
        yield mine


@contextlib.contextmanager
def _held(path: Path) -> Generator[None]:
    """Holds a lock that stays with this process when it becomes another program."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(handle, True)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _taken(folder: Path, gpu: str) -> int:
    """Thousandths of a GPU that living jobs hold; the files of dead ones are removed."""
    total = 0
    for path in folder.glob(f"{gpu}.*.held"):
        try:
            with FileLock(path, timeout=0):
                path.unlink()
        except Timeout:
            total += int(path.name.split(".")[-3])
    return total


def end_with_parent() -> None:
    """Has this process terminated when its parent ends, and whatever program it becomes; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str]) -> None:
    wanted, command = int(arguments[0]), arguments[1:]
    end_with_parent()
    if wanted == 0:
        os.execvp(command[0], command)
    with claim(wanted) as gpus:
        # not as a child: it would outlive this process when that is killed, on GPUs that seem to be free
        os.execvpe(command[0], command, {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)})


if __name__ == "__main__":
    main(sys.argv[1:])
