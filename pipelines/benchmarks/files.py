"""Reading a benchmark's files: what is missing or isn't what it should be is the user's to know."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import StageError


def read_text(path: str, encoding: str = "utf-8") -> str:
    """The text of a file. Raises StageError where it can't be read."""
    try:
        return Path(path).read_text(encoding=encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            f"{path}: can't read this file ({error}). Download the benchmark's data from its public home "
            "and put its path into the benchmark's entry of the configuration."
        ) from None


def read_json(path: str) -> Any:
    """The contents of a JSON file. Raises StageError where it can't be read or isn't JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StageError(f"{path}: not valid JSON ({error}). Download the file again.") from None


@contextmanager
def expecting(where: str, what: str) -> Generator[None]:
    """Turns a missing key or a wrong type into a StageError: ``where`` isn't ``what``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StageError(
            f"{where}: not {what} ({type(error).__name__}: {error}). Use the file as its authors publish it."
        ) from error
