"""Reading data files, gzip or not: what is missing, damaged or something else is the user's to know."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

import pyarrow as pa
from pyarrow import parquet

from pipelines.errors import StageError

if TYPE_CHECKING:
    from datasets import Dataset

_GZIP = b"\x1f\x8b"
_SPACE = r"[ \t\r\n]*"  # as JSON has it
_SIGNS = {sign: re.compile(f"{_SPACE}{re.escape(sign)}{_SPACE}") for sign in "{,:"}
_ENDS = {"{": re.compile(rf"{_SPACE}\{{{_SPACE}\}}{_SPACE}"), ",": re.compile(rf"{_SPACE}\}}{_SPACE}")}
"""Of an object, where no member was read and where one was."""
_PIECE = 2**20
"""Characters of a file that are read at once."""
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


def json_members(path: str | Path, expected: str) -> Iterator[tuple[str, Any]]:
    """The members of the one object that a JSON file holds, in their order, with one at a time in memory.

    Raises StageError, with the position, where it can't be read, isn't JSON or holds something else.
    """
    # ijson takes the last of equal keys without a word, and a lone surrogate for a question mark
    try:
        with _text_stream(path) as file:
            yield from _members(file)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        content = read_json(path, expected)  # which says where it is damaged
        raise StageError(f"{path}, line 1: the file holds {kind_of(content)} at its top; {expected}") from None


@contextmanager
def _text_stream(path: str | Path) -> Generator[TextIO]:
    """The text of a file, unpacked if it is gzip, to be read bit by bit."""
    with Path(path).open("rb") as packed:
        unpacked = gzip.open(packed) if packed.peek(len(_GZIP)).startswith(_GZIP) else packed
        yield io.TextIOWrapper(cast(BinaryIO, unpacked), "utf-8-sig", newline="\n")


def _members(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Raises ValueError where the text isn't one JSON object with distinct keys."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    text, keys = "", set()
    opening = "{"
    while True:
        more = file.read(max(_PIECE, len(text)))  # twice as much each time, as a long member is parsed from its start
        text += more
        place = 0
        while member := _member(decoder, text, place, opening, whole=not more):
            key, value, place = member
            if key in keys:
                raise _RepeatedKey(f"the key {key!r} appears twice in one object")
            keys.add(key)
            yield key, value
            opening = ","
        text = text[place:]
        if not more:
            break
    if not _ENDS[opening].fullmatch(text):
        raise ValueError("not one JSON object")


def _member(decoder: json.JSONDecoder, text: str, place: int, opening: str, whole: bool) -> tuple[str, Any, int] | None:
    """The key and the value that follow on ``opening``, and where they end; None where the text has no whole member.

    Args:
        whole: no more text is to come.
    """
    try:
        key, end = decoder.raw_decode(text, _after(opening, text, place))
        value, end = decoder.raw_decode(text, _after(":", text, end))
    except ValueError as error:
        if isinstance(error, _RepeatedKey):
            raise
        return None
    # what a number or a word at the very end is, only the text to come tells
    return (key, value, end) if isinstance(key, str) and (whole or end < len(text)) else None


def _after(sign: str, text: str, place: int) -> int:
    """Where something begins after a sign and white space. Raises ValueError where the sign isn't next."""
    found = _SIGNS[sign].match(text, place)
    if found is None:
        raise ValueError(f"no {sign}")
    return found.end()


def text_lines(path: str | Path, expected: str) -> Iterator[str]:
    """The lines of a file, one at a time in memory. Raises StageError as :func:`text_of` does."""
    try:
        with _text_stream(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        text_of(path, expected)  # which says where it is damaged
        raise


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


def parse_json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any | ValueError]]:
    """The number and the value of every line that isn't empty; of one that isn't JSON, the error."""
    for number, line in enumerate(lines, start=1):
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


class Distinct:
    """Called with a name, gives it, or where it occurred before the first free of ``-2``, ``-3``, … of it."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._taken:
            number += 1
            unique = f"{name}-{number}"
        self._taken.add(unique)
        return unique


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
