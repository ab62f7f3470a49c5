"""Folders of adapters whose format is this project's own: the weights, and the strategy's settings beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import Tensor

from deltamem.tensor_files import save_tensors
from pipelines.errors import StageError
from pipelines.strategies.lora import WEIGHTS

CONFIG = "adapter_config.json"

Settings = TypeVar("Settings", bound=BaseModel)


def write_adapter(
    folder: Path, form: str, settings: BaseModel, origin: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write both files; ``form`` names the format, ``origin`` the backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    header = {"format": form, **settings.model_dump(exclude={"train"}), **origin}
    (folder / CONFIG).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path, form: str, kind: type[Settings], what: str) -> Settings:
    """The settings of a folder.

    Args:
        kind: of the settings; what of the file isn't theirs, such as the backbone's name, is left out.
        what: the folder should hold, in words.

    Raises:
        StageError: it holds none, or one of another format.
    """
    try:
        values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if values.pop("format") != form:
            raise ValueError(f"its format isn't {form}")
        return kind.model_validate({key: value for key, value in values.items() if key in kind.model_fields})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StageError(f"{folder}: no {what} ({error}). Train this strategy first.") from error
