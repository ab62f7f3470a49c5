"""Configuration errors in words: the key's path, the file, what was wrong, and the closest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipelines.errors import StageError


class RunConfigError(StageError):
    """A configuration of a run that can't be used; one adapter's settings raise the library's ConfigError."""


def describe(
    error: ValidationError,
    model: type[BaseModel],
    where: str,
    files: Mapping[tuple[str, ...], str],
    prefix: tuple[str, ...] = (),
) -> str:
    """One line per problem in a validation error of ``model``.

    ``files`` gives the file by the entry's path for entries that don't come from ``where``; ``prefix`` is the
    path of ``model`` inside the configuration.
    """
    lines = []
    for problem in error.errors():
        path, owner = _walk(model, problem["loc"])
        file = next((files[entry] for n in (2, 3) if (entry := tuple(path[:n])) in files), where)
        key = ".".join([*prefix, *path]) or "the configuration"
        lines.append(f"{file}: {key}: {_reason(problem, owner)}")
    return "\n".join(lines)


def _reason(problem: Mapping[str, Any], owner: type[BaseModel] | None) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key; {hint}"
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_not_found":
        return f"the key {problem['ctx']['discriminator']} is required; it says which kind of entry this is"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        return f"{context['discriminator']} expected one of {context['expected_tags']}, got {context['tag']!r}"
    if kind in ("model_type", "dict_type"):
        return f"expected keys with values, got {_short(value)}"
    message = (
        problem["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "expected")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    if kind == "value_error":
        return message
    return f"{message}, got {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """The path as the user wrote it (without pydantic's union tags), and the model that owns the last key."""
    path: list[str] = []
    owner: type[BaseModel] | None = model
    inside: Any = model
    for step in location:
        if get_origin(inside) is dict:  # its keys are names, which may be those of kinds
            path.append(str(step))
            owner, inside = None, get_args(inside)[-1]
            continue
        choices = _models(inside)
        tagged = [choice for choice in choices if step in _tags(choice)] if len(choices) > 1 else []
        if tagged:
            inside = tagged[0]
            continue
        path.append(str(step))
        owner = choices[0] if len(choices) == 1 and isinstance(inside, type) else None
        if owner is not None:
            fields = {field.alias or name: field for name, field in owner.model_fields.items()}
            inside = fields[step].annotation if step in fields else None
        elif inside is not None:
            arguments = get_args(inside)
            inside = arguments[-1] if arguments else None
    return path, owner


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation can hold directly: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return (
        [
            found
            for argument in get_args(annotation)
            if isinstance(argument, type) or get_args(argument)
            for found in _models(argument)
        ]
        if annotation is not None
        else []
    )


def _tags(model: type[BaseModel]) -> set[str]:
    return {
        tag
        for field in model.model_fields.values()
        for tag in get_args(field.annotation)
        if field.is_required() and isinstance(tag, str)
    }
