"""Records and folders of a run: they appear whole or not at all, and a full disk is named."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from deltamem.tensor_files import error_number
from pipelines.errors import StageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def room_to_write(folder: Path) -> Generator[None]:
    """Turns a full disk, a used-up quota or a file-size limit into a `StageError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else error_number(error)
        if number not in _NO_ROOM:
            raise
        raise StageError(
            f"No room to write in {folder} ({error}). Free some space, or set results_dir to another disk."
        ) from error


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A new folder to fill, which takes the place of ``folder`` at the end, or vanishes if an error passes.

    Raises StageError if the disk gets full, or another process is filling it.
    """
    partial = _beside(folder)
    with alone(folder.with_name(f"{folder.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with room_to_write(folder.parent):
                partial.mkdir(parents=True)
                yield partial
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def alone(lock: Path) -> Generator[None]:
    """Keeps other processes out of the same work, on this machine and on those that share the folder.

    Such as a second run of a workflow whose first was killed: its jobs live on. Raises StageError where there is one.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise StageError(
            f"another process is doing this already: it holds {lock}. Wait until it has ended, or end it, and run the "
            "same command again; it goes on from what is there."
        ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


def check_free_space(folder: Path, needed: int) -> None:
    """Raises StageError if the disk of an existing folder has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageError(
            f"{folder}: not enough disk space for the episodes, about {needed / 1e6:,.1f} MB are needed and "
            f"{free / 1e6:,.1f} MB are free; free some, set results_dir to another disk, or lower "
            "data.max_train_questions and data.max_eval_questions"
        )


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """What :func:`write_record` wrote. Raises StageError, with the remedy, where there is no such record."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: there is no such file. {remedy}") from None
    except (OSError, ValueError) as error:
        raise StageError(f"{path}: can't be read ({error}). {remedy}") from None


def run_first(stage: str) -> str:
    """The remedy for a record that a stage should have left."""
    return f"Run `python -m pipelines.{stage}` for it first."


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record as JSON, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
