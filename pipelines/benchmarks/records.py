"""The records of a benchmark's files: those that can be used, and what became of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipelines.data.documents import BadRecord
from pipelines.data.files import kind_of, read_json
from pipelines.errors import StageError

DOWNLOAD = "Fetch the data (the entry's file in configs says where it is from) and put its path into the entry."
AS_PUBLISHED = "Use the file as its authors publish it."

_Made = TypeVar("_Made")


def read_array(path: str, form: str) -> list[Any]:
    """The records of a JSON file that holds one array. Raises StageError where it doesn't."""
    records = read_json(path, DOWNLOAD)
    if not isinstance(records, list):
        raise StageError(f"{path}: the file holds {kind_of(records)}, not an array of {form}. {AS_PUBLISHED}")
    return records


def usable(
    records: Iterable[Any], make: Callable[[int, Any], _Made | None], place: str, form: str, bad: list[BadRecord]
) -> Iterator[_Made]:
    """What is made of the records, in their order; those that can't be used are noted in ``bad``.

    Args:
        make: of a record's number, from 0, and the record; None where it isn't asked for.
        place: the file and what its records are, such as "hotpot.json, question".
        form: what a record should be, such as "a HotpotQA question".

    Raises:
        StageError: there is no record, or nothing in them can be used.
    """
    start, number, any_made = len(bad), -1, False
    for number, record in enumerate(records):
        where = f"{place} {number}"
        made = attempt(lambda number=number, record=record: make(number, record), "record", where, form, bad)
        if made is not None:
            any_made = True
            yield made
    lost = bad[start:]
    file = place.rpartition(", ")[0]
    if lost and not any_made:
        more = f" (the first of {len(lost)})" if len(lost) > 1 else ""
        raise StageError(
            f"{file}: nothing in it can be used{more}: {lost[0].paper_id}: {lost[0].reason}. {AS_PUBLISHED}"
        )
    if number < 0:
        raise StageError(f"{file}: there is no record in it. {DOWNLOAD}")


def attempt(
    make: Callable[[], _Made], lost: str, where: str, form: str, bad: list[BadRecord], question_id: str | None = None
) -> _Made | None:
    """What is made of a part of a record; None where it isn't of its form, which is noted as ``lost``."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        bad.append(BadRecord(lost, where, question_id, f"not {form} ({reason})"))
        return None


def text(value: Any, name: str) -> str:
    """A text that says something. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {kind_of(value)}, not text")
    if not value.strip():
        raise ValueError(f"its {name} is empty")
    return value


def reference(value: Any) -> str:
    """An accepted answer: a text or a number. Raises ValueError for anything else, such as null or a list."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"its answer is {value}, not a number")
        return str(value)
    return text(value, "answer")
