"""The one exception by which a stage says that its input or its machine, not its code, is at fault."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text


class StageError(Exception):
    """A stage can't do its work, for a reason its user can act on.

    The message says in one paragraph what was wrong, where, and what to do. `run_stage` prints it without a
    traceback; every other exception that leaves a stage is a bug and keeps its traceback.
    """


def run_stage(app: Callable[[], object]) -> None:
    """Runs a stage's typer app as a program; a `StageError` ends it with its message and exit code 1."""
    atexit.register(gc.freeze)  # else Python's end looks through all that large libraries made, for a second
    try:
        app()
    except StageError as error:
        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(file=sys.stderr, soft_wrap=True).print(message)
        sys.exit(1)
