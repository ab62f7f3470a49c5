"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card (README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltamem.adapters import public_release
from deltamem.adapters.card import model_card
from deltamem.adapters.names import parameter_count
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError, ConfigError, DeltaMemError
from deltamem.tensor_files import save_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "deltamem"


def require_free(folder: Path) -> None:
    """Raises DeltaMemError where an adapter can't be written without overwriting something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeltaMemError(f"{folder} exists and isn't an empty folder; name another")


def save_adapter(folder: Path, config: DeltaMemConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter folder; tensors keep their dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    header = {"format": FORMAT, "format_version": 1, **config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if not card.exists():
        card.write_text(model_card(config, parameter_count(tensors)), encoding="utf-8")


def load_adapter(folder: Path) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    """Read an adapter folder of either format.

    Raises:
        AdapterFormatError: no adapter there, or a malformed one.
    """
    if (folder / CONFIG_FILE).is_file():
        header = _read_json(folder / CONFIG_FILE)
        if header.pop("format", None) != FORMAT:
            raise AdapterFormatError(f"{folder / CONFIG_FILE} is not a δ-mem adapter (its 'format' is not {FORMAT!r})")
        version = header.pop("format_version", None)
        if version != 1:
            raise AdapterFormatError(f"{folder / CONFIG_FILE}: format_version {version!r} is not known; known: 1")
        try:
            config = DeltaMemConfig.from_dict(header)
        except ConfigError as error:
            raise AdapterFormatError(f"{folder / CONFIG_FILE}: {error}") from error
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            raise AdapterFormatError(f"{folder} has no {WEIGHTS_FILE}")
        try:
            return config, load_file(weights)
        except SafetensorError as error:
            raise AdapterFormatError(f"{weights} is not a readable safetensors file: {error}") from error
    public_config = folder / public_release.CONFIG_FILE
    if public_config.is_file():
        return public_release.read(folder, _read_json(public_config))
    raise AdapterFormatError(
        f"{folder} holds no adapter: neither {CONFIG_FILE} (this project) nor {public_release.CONFIG_FILE} "
        "(the public release)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
