"""Episodes on disk: Arrow IPC files that map into memory or stream batch by batch, and their manifest.

A folder of shards appears whole or not at all: it is written under another name and renamed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.errors import StageError
from pipelines.run.files import file_digest

MANIFEST = "manifest.json"
PAPERS = "papers"
"""Name of the source of a configuration that has a single ``source`` of papers."""
ROWS_PER_BATCH = 16

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PAPER_SCHEMA = pa.schema(
    [
        ("paper_id", pa.string()),
        ("question_id", pa.string()),
        ("context_ids", pa.list_(pa.int32())),
        ("segment_ids", pa.list_(pa.int32())),
        ("messages", _MESSAGES),
        ("question", pa.string()),
        ("question_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_type", pa.string()),
        ("references", pa.list_(pa.string())),
    ]
)
"""Of shards from a single source of papers, whose prompts are their questions."""

MIXTURE_SCHEMA = PAPER_SCHEMA.append(pa.field("source", pa.string())).append(pa.field("prompt", _MESSAGES))
"""Of shards from sources all of whose answers are weighed evenly."""

SCHEMA = MIXTURE_SCHEMA.append(pa.field("answer_weights", pa.list_(pa.float32())))
"""One row is one question. context_ids are the tokens to write and segment_ids, as long, the message each
belongs to (-1: the template's own tokens); question_ids is the prompt to read, answer_ids the answer to learn
with its end-of-turn token; messages is what context_ids was made from, references all annotators' answers.
source is the name of the entry in data.sources that a row is from, and prompt the messages that question_ids was made
from; question is the last of them. answer_weights, as long as answer_ids, say what each token counts in its answer's
loss, relative to the others; null: all alike. Rows of one paper_id share what is written."""


def write_shards(
    rows: Iterable[dict[str, Any]], folder: Path, shard_bytes: int, schema: pa.Schema = SCHEMA
) -> list[dict[str, Any]]:
    """Writes rows of a schema to ``shard-00000.arrow``, … in a folder; a shard ends once it holds shard_bytes.

    Returns {file, rows, bytes, sha256} per shard. The same rows give the same bytes. Raises OSError as the
    file system does.
    """
    shards = []
    batches = _batches(rows, schema)
    for batch in batches:
        path = folder / f"shard-{len(shards):05d}.arrow"
        count = size = 0
        # A Python file rather than Arrow's own, for its errors carry errno.
        with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            while batch is not None:
                writer.write_batch(batch)
                count += batch.num_rows
                size += batch.nbytes
                batch = next(batches, None) if size < shard_bytes else None
        shards.append({"file": path.name, "rows": count, "bytes": path.stat().st_size, "sha256": file_digest(path)})
    return shards


def _batches(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_PER_BATCH)):
        yield pa.RecordBatch.from_pylist(chunk, schema=schema)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest; ``manifest["shards"]`` is what ``write_shards`` returned."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of episodes. Raises StageError if there is none or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["shards"]
    except FileNotFoundError:
        raise StageError(f"{folder}: no episodes here ({MANIFEST} is missing); run the preprocess stage") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error!r}); {_remedy(folder)}") from None
    return manifest


def open_episodes(folder: str | Path) -> pa.Table:
    """All episodes of a folder as one table of ``SCHEMA``, mapped into memory: nothing is read before it is used.

    Checks every shard against the manifest first. Raises StageError naming the shard that is missing or damaged.
    """
    folder = Path(folder)
    tables = [SCHEMA.empty_table()]
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise StageError(f"{path}: the manifest lists this shard, but it is missing; {_remedy(folder)}")
        if file_digest(path) != shard["sha256"]:
            raise StageError(
                f"{path}: this shard is corrupt ({path.stat().st_size} bytes, {shard['bytes']} were written; "
                f"its sha256 differs from the manifest's); {_remedy(folder)}"
            )
        tables.append(_completed(pa.ipc.open_file(pa.memory_map(str(path))).read_all()))
    return pa.concat_tables(tables)


def _completed(table: pa.Table) -> pa.Table:
    """A table of ``SCHEMA``: one of another schema gets the columns that say nothing new of its rows."""
    if table.schema == SCHEMA:
        return table
    count = table.num_rows
    if table.schema == MIXTURE_SCHEMA:
        weights = SCHEMA.field("answer_weights")
        return table.append_column(weights, pa.nulls(count, weights.type))
    said = [pa.repeat(pa.scalar("user"), count), table["question"].combine_chunks()]
    message = pa.StructArray.from_arrays(said, fields=list(_MESSAGES.value_type))
    prompt = pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), message).cast(_MESSAGES)
    source = pa.repeat(pa.scalar(PAPERS), count)
    return _completed(table.append_column("source", source).append_column("prompt", prompt))


def whole_chat(row: dict[str, Any]) -> list[dict[str, str]]:
    """What is written and what is read of a row as one chat, with its system message in front and nothing twice."""
    prompt = row["prompt"]
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    written = [message for message in row["messages"] if message not in system]
    visible = prompt[len(system) :]
    return [*system, *(written if written[-len(visible) :] == visible else [*written, *visible])]


def read_rows(episodes: pa.Table, rows: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of some rows, by name.

    Best for many rows at once: a table has a record batch for every few of them, and naming a column of it looks at all
    of these, as slice() and take() do for every row.
    """
    chosen = {name: episodes[name] for name in columns}
    return [{name: column[row].as_py() for name, column in chosen.items()} for row in rows]


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run the preprocess stage again"
