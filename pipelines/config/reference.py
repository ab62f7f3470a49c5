"""Every key of a configuration as a page: ``python -m pipelines.config.reference`` writes configs/README.md anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from deltamem.config import DeltaMemConfig
from pipelines.config.files import NAMED_KINDS, PROJECT_ROOT
from pipelines.config.resolve import Config

REFERENCE_FILE = PROJECT_ROOT / "configs" / "README.md"

INTRODUCTION = """\
# The configuration

<!-- Written by python -m pipelines.config.reference from the schema (pipelines/config) and the files' first lines. -->

A run is one YAML file, `snakemake --configfile configs/NAME.yaml`. An unknown key, a wrong type or a value outside its
range ends the run before any job starts, with the key's path and the file it is in.

- **Files by name.** What `configs/KIND/NAME.yaml` holds is called by its name: `strategies: [tsw, ssw]`. As a mapping,
  an entry is written out in place or is a file's with keys of its own laid over it:
  `strategies: {wide: {from: tsw, adapter: {rank: 16}}}`.
- **Files over files.** `--configfile A.yaml B.yaml` lays B over A, section by section; `configs/overrides/` has files
  meant for that. `--config 'train={max_steps: 4}'` lays over what is given on the command line.
- **Numbers** may be written as `2e-4`; paths are relative to the folder the command runs in.
- **For editors** the same keys are a JSON schema, `workflow/schemas/config.schema.json`.

Change a key and Snakemake runs again what depends on it, and nothing else.
"""


class Keys(NamedTuple):
    """One table of the page: where its keys stand, what they are for, and their JSON schemas by name."""

    title: str
    purpose: str
    properties: Mapping[str, Mapping[str, Any]]
    required: frozenset[str]


def reference_text() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION, "## What is there\n", _files(), *(_section(keys) for keys in tables())]
    return "\n".join(parts)


def tables() -> Iterator[Keys]:
    """Every table of the page, in the order of the sections."""
    schema = Config.model_json_schema()
    yield _keys("The run", schema, schema["$defs"])
    for name, entry in schema["properties"].items():
        for keys in _below(name, entry, schema["$defs"]):
            yield keys
            if "adapter" in keys.properties:
                yield _keys("`adapter` of `kind: delta`", TypeAdapter(DeltaMemConfig).json_schema(), {})


def _below(path: str, entry: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[Keys]:
    """The tables of what a key holds: of a section, or of each kind of entry, and of the sections inside."""
    for inside in (*entry.get("anyOf", ()), *entry.get("patternProperties", {}).values()):
        yield from _below(path, inside, definitions)
    if "items" in entry:
        yield from _below(path, entry["items"], definitions)
    if "discriminator" in entry:
        tag = entry["discriminator"]["propertyName"]
        found = {f"`{path}`: `{tag}: {kind}`": ref for kind, ref in entry["discriminator"]["mapping"].items()}
    else:
        found = {f"`{path}`": entry["$ref"]} if "$ref" in entry else {}
    for title, reference in found.items():
        section = definitions[_definition(reference)]
        yield _keys(title, section, definitions)
        for name, inner in section["properties"].items():
            yield from _below(f"{path}.{name}", inner, definitions)


def _keys(title: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Keys:
    properties = {}
    for name, entry in section["properties"].items():
        if "$ref" in entry:
            entry = {"description": _purpose(definitions[_definition(entry["$ref"])]), **entry}
        if "const" not in entry:
            properties[name] = entry
    return Keys(title, _purpose(section), properties, frozenset(section.get("required", ())))


def _definition(reference: str) -> str:
    return reference.rpartition("/")[2]


def _purpose(section: Mapping[str, Any]) -> str:
    """The first paragraph of a section's docstring."""
    return section.get("description", "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")


def _section(keys: Keys) -> str:
    rows = [
        f"| `{name}` | {_type(entry)} | {_default(entry, name in keys.required)} | {entry.get('description', '')} |"
        for name, entry in keys.properties.items()
    ]
    return "\n".join([f"## {keys.title}", "", keys.purpose, "", "| key | type | default | meaning |",
                      "|---|---|---|---|", *rows, ""])  # fmt: skip


def _type(entry: Mapping[str, Any]) -> str:
    if "anyOf" in entry:
        return " or ".join(map(_type, entry["anyOf"]))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    kind = entry.get("type")
    if kind == "array":
        return f"list of {_type(entry['items'])}"
    if kind in ("integer", "number"):
        return kind + _range(entry)
    return {"string": "text", "boolean": "true or false", "null": "null"}.get(kind, "keys")


def _range(entry: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {entry[name]:g}" for name, sign in signs.items() if name in entry]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(entry: Mapping[str, Any], required: bool) -> str:
    if required:
        return "**required**"
    if "default" in entry:
        return f"`{json.dumps(entry['default'], ensure_ascii=False)}`"
    return "`[]`" if entry.get("type") == "array" else "`{}`"


def _files() -> str:
    """The files of ``configs``, each with the first sentence of its first comment."""
    folders = ["", *NAMED_KINDS, "overrides"]
    paths = [path for name in folders for path in sorted((REFERENCE_FILE.parent / name).glob("*.yaml"))]
    rows = [f"| [{_name(path)}]({_name(path)}) | {_first_sentence(path)} |" for path in paths]
    return "\n".join(["| file | what it is |", "|---|---|", *rows, ""])


def _name(path: Path) -> str:
    return path.relative_to(REFERENCE_FILE.parent).as_posix()


def _first_sentence(path: Path) -> str:
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")


def main(path: Path = REFERENCE_FILE) -> None:
    path.write_text(reference_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
