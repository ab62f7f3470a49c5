"""Records of an evaluation: appended as they come, found again by an interrupted job, kept as one Parquet
file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Record = dict[str, Any]


class RecordLog:
    """A JSON-lines file: first the key, then records (one question under one condition) and what they cost.

    The key tells what was asked of what. A file with the same key is gone on with, except for a last line
    that was not written whole; one with another key is set aside, in the place of one set aside before.

    Attributes:
        records: all records, those of earlier runs first.
        set_aside: where a file with another key lies now; None: there was none.
        costs: {"part", "seconds", "tokens", "peak_bytes"} for every batch of work, likewise.
        path, key: as given.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.records: list[Record] = []
        self.costs: list[dict[str, Any]] = []
        self._known: set[tuple[str, str]] = set()
        self.path, self.key = path, dict(key)
        self.set_aside: Path | None = None
        header = {"key": self.key}
        kept = self._read(path, header) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if not kept and path.exists() and path.stat().st_size:
            self.set_aside = path.replace(path.with_suffix(".before.jsonl"))
        self._file = path.open("r+b" if kept else "w+b")
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._append([header])

    def has(self, condition: str, question_id: str) -> bool:
        return (condition, question_id) in self._known

    def add(self, records: Sequence[Record], cost: dict[str, Any]) -> None:
        """Append a batch of records and its cost; they are on the disk when this returns."""
        # one line, so that a record is never there without its cost
        self._append([{"records": list(records), "cost": cost}])
        self._take(records, cost)

    def close(self) -> None:
        self._file.close()

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        self._file.flush()

    def _take(self, records: Sequence[Record], cost: dict[str, Any]) -> None:
        self.records += records
        self.costs.append(cost)
        self._known |= {(record["condition"], record["question_id"]) for record in records}

    def _read(self, path: Path, header: dict[str, Any]) -> int:
        """Takes what an earlier run left; returns how many bytes of the file are to be kept."""
        kept = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                content = json.loads(line)
                if kept:
                    self._take(content["records"], content["cost"])
                elif content != json.loads(json.dumps(header)):
                    break
                kept += len(line)
        return kept


def write_parquet(records: Sequence[Record], path: Path) -> None:
    """All records as one table, in the order of question and condition; it appears whole or not at all."""
    table = pa.Table.from_pylist(list(records)).sort_by([("question_id", "ascending"), ("condition", "ascending")])
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    partial.replace(path)
