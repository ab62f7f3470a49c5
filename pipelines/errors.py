"""The one exception by which a stage says that its input or its machine, not its code, is at fault."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StageError(Exception):
    """A stage can't do its work, for a reason its user can act on.

    The message says in one paragraph what was wrong, where, and what to do. `run_stage` prints it without a
    traceback; every other exception that leaves a stage is a bug and keeps its traceback.
    """


def run_stage(app: Callable[[], object]) -> None:
    """Runs a stage's typer app as a program; a `StageError` ends it with its message and exit code 1."""
    try:
        app()
    except StageError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(file=sys.stderr, soft_wrap=True).print(message)
        sys.exit(1)


@contextmanager
def room_to_write(folder: Path) -> Iterator[None]:
    """Turns a full disk, a used-up quota or a file-size limit into a `StageError` that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _error_number(error) not in _NO_ROOM:
            raise
        raise StageError(
            f"No room to write in {folder} ({error}). Free some space, or set results_dir to another disk."
        ) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors gives the number only in its text
    return int(found[1]) if found else None
