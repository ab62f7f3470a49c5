"""Reading configuration files, laying them over one another, and merging the entries they name into one mapping."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.errors import RunConfigError

NAMED_KINDS = {
    "backbones": ("backbones",),
    "strategies": ("strategies",),
    "benchmarks": ("benchmarks",),
    "data": ("data", "sources"),
}
"""Where the entries stand that are kept one a file in ``configs/<kind>/<name>.yaml``, by kind."""

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises RunConfigError when it is missing, broken or something else, or has a key twice.
    """
    found = path if path.is_absolute() or path.exists() else PROJECT_ROOT / path
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunConfigError(f"{path}: can't read this file ({error})") from None
    try:
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_object)
        else:
            content = yaml.load(text, _Loader)
    except _RepeatedKey as error:
        raise RunConfigError(f"{path}: {error}; keep one of them") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise RunConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(content, dict):
        raise RunConfigError(f"{path}: expected keys with values, got {type(content).__name__}")
    return content


class _RepeatedKey(Exception):
    """Of equal keys both YAML's loader and JSON's keep the last and say nothing."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            # a key that "<<" brings in from elsewhere may be written again, to change its value
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    raise _RepeatedKey(f"line {line}: the key {key.value!r} stands in line {first} already")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise _RepeatedKey(f"the key {repeated[0]!r} stands twice in one object")
    return dict(pairs)


def read_layers(paths: Sequence[str | Path], command_line: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files laid one over another, section by section, and a command line's keys over them all.

    A list of names takes the place of what was there; laid over a list of names, a mapping changes the entries that it
    names and adds others.

    Args:
        command_line: what Snakemake makes of ``--config``: texts where YAML would have numbers.
    """
    merged: dict[str, Any] = {}
    for layer in [*(read_mapping(Path(path)) for path in paths), _typed(command_line)]:
        for kind in NAMED_KINDS.values():
            _meet(merged, layer, kind)
        merged = _laid_over(merged, layer)
    return merged


def _meet(below: dict[str, Any], above: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Writes a list of names as a mapping where a mapping is going to be laid over it."""
    *sections, key = path
    for section in sections:
        inner, laid = below.get(section), above.get(section)
        if not (isinstance(inner, dict) and isinstance(laid, Mapping)):
            return
        below, above = inner, laid
    if isinstance(below.get(key), list) and isinstance(above.get(key), Mapping):
        below[key] = {name: {"from": name} for name in below[key]}


def _typed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _typed(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_typed(inside) for inside in value]
    if not isinstance(value, str):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return read if read is None or isinstance(read, bool | int | float) else value


def merge_named_entries(mapping: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Replaces a list of names by ``{name: contents of its file}``, and completes entries ``{from: NAME, …}``.

    An entry with ``from`` is that of the named file with its own keys laid over it, section by section. Any other
    entry written out in place stays as it is. Returns the merged mapping and, for every entry that comes from a
    file, that file by the entry's path.
    """
    merged, files = dict(mapping), {}
    for kind, path in NAMED_KINDS.items():
        *sections, key = path
        parent = merged
        for section in sections:
            if not isinstance(parent.get(section), Mapping):
                break
            parent[section] = parent = dict(parent[section])
        else:
            entries = parent.get(key)
            if isinstance(entries, list):
                entries = _named(kind, path, entries, where)
            if isinstance(entries, Mapping):
                parent[key] = {
                    name: _entry(kind, (*path, name), entry, where, files) for name, entry in entries.items()
                }
    return merged, files


def _entry(kind: str, path: tuple[str, ...], entry: Any, where: str, files: dict[tuple[str, ...], str]) -> Any:
    """One entry, completed from the file that it names; notes that file in ``files``."""
    if entry is None:
        name = path[-1]
        raise RunConfigError(
            f"{where}: {'.'.join(map(str, path))}: this entry is empty; write {{from: {name}}} for the file "
            f"configs/{kind}/{name}.yaml, or its keys"
        )
    if not isinstance(entry, Mapping) or "from" not in entry:
        return entry
    file = _entry_file(kind, entry["from"], where)
    own = {key: value for key, value in entry.items() if key != "from"}
    files[path] = f"{where} (from {file})" if own else str(file)
    return _laid_over(read_mapping(file), own)


def _named(kind: str, path: tuple[str, ...], names: list[Any], where: str) -> dict[str, Any]:
    """The entries that a list of names stands for."""
    key = ".".join(path)
    for number, name in enumerate(names):
        if isinstance(name, Mapping):
            hint = ", ".join(f"{entry}: {{from: {entry}}}" for entry in names if isinstance(entry, str))
            raise RunConfigError(
                f"{where}: {key}: expected names of files in configs/{kind}, got {name!r}; to change keys of an "
                f"entry, write all of them as a mapping, {key}: {{{hint or 'NAME: {from: NAME}'}, …}}"
            )
        if not isinstance(name, str):
            raise RunConfigError(f"{where}: {key}: expected names of files in configs/{kind}, got {name!r}")
        if name in names[:number]:
            raise RunConfigError(f"{where}: {key}: {name!r} is listed twice")
    return {name: {"from": name} for name in names}


def _laid_over(entry: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**entry, **own}
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(entry.get(key), Mapping):
            merged[key] = _laid_over(entry[key], value)
    return merged


def _entry_file(kind: str, name: Any, where: str) -> Path:
    key = ".".join(NAMED_KINDS[kind])
    if not isinstance(name, str):
        raise RunConfigError(f"{where}: {key}: 'from' expects the name of a file in configs/{kind}, got {name!r}")
    own = Path("configs") / kind / f"{name}.yaml"
    if own.exists() or (PROJECT_ROOT / own).exists():
        return own
    known = sorted({path.stem for root in (Path(), PROJECT_ROOT) for path in (root / "configs" / kind).glob("*.yaml")})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    raise RunConfigError(f"{where}: {key}: no file {own} for {name!r}; {hint}")
