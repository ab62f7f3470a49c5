"""What is too much to keep in memory, one thing after the other in a temporary file."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from pipelines.run.files import room_to_write

T = TypeVar("T")


class Spool(Generic[T]):
    """Values that can be gone through in their order, as often as is wanted; of each there are copies.

    Their file lies in Python's folder of temporary files (TMPDIR) and goes with this object.

    Raises:
        StageError: there is no room for it.
    """

    def __init__(self, values: Iterable[T]):
        folder = Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=folder)
        self._starts = array("Q")
        with room_to_write(folder):
            for value in values:
                self._starts.append(self._file.tell())
                pickle.dump(value, self._file)
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[T]:
        for start in self._starts:
            self._file.seek(start)
            yield pickle.load(self._file)
