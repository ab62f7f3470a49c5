"""Reading data files, gzip or not: what is missing, damaged or something else is the user's to know."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from pipelines.errors import StageError

if TYPE_CHECKING:
    from datasets import Dataset

_GZIP = b"\x1f\x8b"
_SURROGATE = re.compile("[\ud800-\udfff]")
_COMMIT = re.compile("[0-9a-f]{40}")


def contents(path: str | Path) -> bytes:
    """The bytes of a file, unpacked if it is gzip. Raises OSError, also where the gzip is damaged or cut off."""
    found = Path(path).read_bytes()
    if not found.startswith(_GZIP):
        return found
    try:
        return gzip.decompress(found)
    except EOFError:
        raise OSError("the gzip file is cut off; fetch it again") from None
    except zlib.error as error:
        raise OSError(f"the gzip file is damaged, {error}; fetch it again") from None


def text_of(path: str | Path, expected: str, encoding: str = "utf-8-sig") -> str:
    """The text of a file. Raises StageError, which says what was expected, where it can't be read."""
    try:
        return contents(path).decode(encoding)
    except OSError as error:
        raise StageError(f"{path}: can't be read ({error.strerror or error}); {expected}") from None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}, byte {error.start}: not UTF-8 text; {expected}") from None


def read_json(path: str | Path, expected: str) -> Any:
    """What a JSON file holds. Raises StageError, with the position, where it can't be read or isn't JSON."""
    return parse_json(text_of(path, expected), path, expected)


def parquet_rows(path: str | Path, form: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, with some of its columns or all. Raises StageError where it can't be read."""
    try:
        for batch in parquet.ParquetFile(io.BytesIO(contents(path))).iter_batches(16, columns=columns):
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise StageError(f"{path}: not {form}, it can't be read as Parquet ({error})") from None


def parse_json(text: str, path: str | Path, expected: str) -> Any:
    """What a JSON text holds. Raises StageError, with the position, if it isn't JSON or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "the file seems to be cut off; fetch it again" if cut_off else expected
        raise StageError(f"{where}: not JSON ({error.msg}); {hint}") from None
    except RecursionError:
        raise StageError(f"{path}: nested too deeply; {expected}") from None
    except _RepeatedKey as error:
        raise StageError(f"{path}: {error}; {expected}") from None


def parse_json_lines(text: str) -> Iterator[tuple[int, Any | ValueError]]:
    """The number and the value of every line that isn't empty; of one that isn't JSON, the error."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except (json.JSONDecodeError, _RepeatedKey) as error:
                yield number, ValueError(f"not JSON ({error})")


class _RepeatedKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The json module keeps the last of equal keys and says nothing; here that would lose a record in silence.
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(repr(key) for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"the key {repeated} appears twice in one object")
    return result


def mended(value: Any) -> tuple[Any, int]:
    """A JSON value with every lone surrogate replaced by U+FFFD, and how many there were.

    JSON can write half of a character ("\\ud83d"), which no tokenizer and no file takes.
    """
    if isinstance(value, str):
        return _SURROGATE.subn("\ufffd", value)
    if isinstance(value, Mapping):
        pairs = [(mended(key), mended(inside)) for key, inside in value.items()]
        return {key: inside for (key, _), (inside, _) in pairs}, sum(a + b for (_, a), (_, b) in pairs)
    if isinstance(value, list):
        found = [mended(inside) for inside in value]
        return [inside for inside, _ in found], sum(count for _, count in found)
    return value, 0


def distinct(names: Iterable[str]) -> Iterator[str]:
    """The names, where one that occurred before gets the first free of ``-2``, ``-3``, …"""
    taken: set[str] = set()
    for name in names:
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique)
        yield unique


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def from_hub(where: str, instead: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gets from the Hub. Raises StageError, with what to do instead, where the Hub says no."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        return load()
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        # datasets raises an error of its own, without the Hub's as its cause
        if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
            raise StageError(
                f"{where}: is gated on the Hub. Accept its terms there and log in with `hf auth login`; or {instead}."
            ) from error
        raise StageError(
            f"{where}: can't be loaded from the Hub ({type(error).__name__}: {error}). Without network, {instead}."
        ) from error


def hub_origin(hub_id: str, revision: str | None, table: Dataset, rows: Any) -> dict[str, Any]:
    """What a manifest says of a data set of the Hub: the revision asked for, its commit, and a digest of the rows."""
    # datasets keeps what it has prepared in a folder that is named for the commit, and tells it nowhere else
    commits = (Path(file["filename"]).parent.name for file in table.cache_files)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
    commit = next(filter(_COMMIT.fullmatch, commits), None)
    return {"hub": hub_id, "revision": revision, "commit": commit, "sha256": digest}
