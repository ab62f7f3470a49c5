"""Reading configuration files, and merging the entries they name into one mapping."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.errors import RunConfigError

NAMED_KINDS = ("backbones", "strategies", "benchmarks")
"""Keys whose entries are kept one a file in ``configs/<kind>/<name>.yaml``."""

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises RunConfigError when it is missing, broken or something else."""
    found = path if path.is_absolute() or path.exists() else PROJECT_ROOT / path
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunConfigError(f"{path}: can't read this file ({error})") from None
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise RunConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(content, dict):
        raise RunConfigError(f"{path}: expected keys with values, got {type(content).__name__}")
    return content


def merge_named_entries(mapping: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[tuple[str, str], str]]:
    """Replaces a list of names by ``{name: contents of its file}``, and completes entries ``{from: NAME, …}``.

    An entry with ``from`` is that of the named file with its own keys laid over it, section by section. Any other
    entry written out in place stays as it is. Returns the merged mapping and, for every entry that comes from a
    file, that file by (kind, name).
    """
    merged, files = dict(mapping), {}
    for kind in NAMED_KINDS:
        entries = merged.get(kind)
        if isinstance(entries, list):
            entries = _named(kind, entries, where)
        if not isinstance(entries, Mapping):
            continue
        merged[kind] = dict(entries)
        for name, entry in entries.items():
            if isinstance(entry, Mapping) and "from" in entry:
                path = _entry_file(kind, entry["from"], where)
                own = {key: value for key, value in entry.items() if key != "from"}
                merged[kind][name] = _laid_over(read_mapping(path), own)
                files[kind, name] = f"{where} (from {path})" if own else str(path)
    return merged, files


def _named(kind: str, names: list[Any], where: str) -> dict[str, Any]:
    """The entries that a list of names stands for."""
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise RunConfigError(f"{where}: {kind}: expected names of files in configs/{kind}, got {name!r}")
        if name in names[:number]:
            raise RunConfigError(f"{where}: {kind}: {name!r} is listed twice")
    return {name: {"from": name} for name in names}


def _laid_over(entry: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**entry, **own}
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(entry.get(key), Mapping):
            merged[key] = _laid_over(entry[key], value)
    return merged


def _entry_file(kind: str, name: Any, where: str) -> Path:
    if not isinstance(name, str):
        raise RunConfigError(f"{where}: {kind}: 'from' expects the name of a file in configs/{kind}, got {name!r}")
    own = Path("configs") / kind / f"{name}.yaml"
    if own.exists() or (PROJECT_ROOT / own).exists():
        return own
    known = sorted({path.stem for root in (Path(), PROJECT_ROOT) for path in (root / "configs" / kind).glob("*.yaml")})
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    raise RunConfigError(f"{where}: {kind}: no file {own} for {name!r}; {hint}")
