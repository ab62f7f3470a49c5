"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card (README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltamem import public_release
from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError, ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "deltamem"
INPUTS = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")
FILES = [CONFIG_FILE, WEIGHTS_FILE, public_release.CONFIG_FILE, public_release.WEIGHTS_FILE, "README.md"]


def tensor_name(layer: int | str, name: str) -> str:
    """Both formats name tensors alike."""
    return f"model.layers.{layer}.self_attn.{name}"


def collect_tensors(parameters: dict[str, Tensor], config: DeltaMemConfig) -> dict[str, Tensor]:
    """Rename and split the parameters of ``DeltaMemModel.memory_layers`` (its state_dict) as the format has them."""
    tensors = {}
    for name, value in parameters.items():
        layer, _, rest = name.partition(".")
        if rest == "in_proj":
            for block_name, block in zip(INPUTS, value.split(config.width), strict=True):
                tensors[tensor_name(layer, block_name)] = block
        elif rest == "beta_bias":
            tensors[tensor_name(layer, rest)] = value
        else:  # steer.<head>
            tensors[tensor_name(layer, f"delta_{rest.removeprefix('steer.')}_proj")] = value
    return tensors


def fill_layers(layers: nn.ModuleDict, tensors: dict[str, Tensor], config: DeltaMemConfig, where: str) -> None:
    """Copy tensors into the layers; every tensor must be there, have its shape, and be used.

    Raises:
        AdapterFormatError: names the tensor that is missing, misshapen or left over.
    """
    left = dict(tensors)

    def take(layer: str, name: str, target: Tensor) -> None:
        full = tensor_name(layer, name)
        tensor = left.pop(full, None)
        if tensor is None:
            raise AdapterFormatError(f"{where}: tensor {full} is missing")
        if tensor.shape != target.shape:
            raise AdapterFormatError(
                f"{where}: tensor {full} has shape {tuple(tensor.shape)}, the config and this backbone need "
                f"{tuple(target.shape)}; is this the backbone that the adapter was made for?"
            )
        target.copy_(tensor)

    with torch.no_grad():
        for i, layer in layers.items():
            for name, block in zip(INPUTS, layer.in_proj.split(config.width), strict=True):
                take(i, name, block)
            take(i, "beta_bias", layer.beta_bias)
            for head, weight in layer.steer.items():
                take(i, f"delta_{head}_proj", weight)
    if left:
        raise AdapterFormatError(f"{where}: {len(left)} tensors belong to no layer of this adapter: {_some(left)}")


def save_adapter(folder: Path, config: DeltaMemConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter folder; tensors keep their dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    header = {"format": FORMAT, "format_version": 1, **config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if not card.exists():
        card.write_text(_model_card(config, sum(t.numel() for t in tensors.values())), encoding="utf-8")


def load_adapter(folder: Path) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    """Read an adapter folder of either format.

    Raises:
        AdapterFormatError: no adapter there, or a malformed one.
    """
    if (folder / CONFIG_FILE).is_file():
        header = read_json(folder / CONFIG_FILE)
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
    if (folder / public_release.CONFIG_FILE).is_file():
        return public_release.read(folder)
    raise AdapterFormatError(
        f"{folder} holds no adapter: neither {CONFIG_FILE} (this project) nor {public_release.CONFIG_FILE} "
        "(the public release)"
    )


def locate(path: str | Path) -> Path:
    """The local folder behind a path, a Hub id or an MLflow ``models:/`` address.

    Raises:
        AdapterFormatError: it can't be found or fetched.
    """
    text = str(path)
    if text.startswith("models:/"):
        folder = _from_registry(text)
    elif Path(path).is_dir():
        folder = Path(path)
    else:
        folder = _from_hub(text)
    nested = folder / "adapter"
    return nested if nested.is_dir() and not (folder / CONFIG_FILE).is_file() else folder


def _from_registry(uri: str) -> Path:
    try:
        import mlflow
    except ImportError as error:
        raise AdapterFormatError(f"{uri}: a registry address needs the package mlflow") from error
    store = mlflow.get_registry_uri()
    file = store.removeprefix("sqlite:///").split("?")[0]
    if store.startswith("sqlite:///") and not Path(file).is_file():  # mlflow would make an empty one
        raise AdapterFormatError(
            f"{uri}: there is no MLflow store at {store}; name the one that has the model with MLFLOW_TRACKING_URI, "
            "e.g. sqlite:///results/mlflow.db"
        )
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except mlflow.exceptions.MlflowException as error:
        raise AdapterFormatError(
            f"{uri} was not found in the MLflow registry at {store} (MLFLOW_TRACKING_URI names another): {error}"
        ) from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterFormatError(
            f"{name!r} is neither a local folder nor an adapter that the Hub gave us ({type(error).__name__}: {error})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _some(names: dict[str, Tensor]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def _model_card(config: DeltaMemConfig, parameters: int) -> str:
    base = config.base_model_name_or_path or "unknown"
    return f"""---
library_name: deltamem
base_model: {base}
tags: [delta-mem, memory, adapter]
---

# δ-mem adapter for {base}

An online memory of {config.num_states} state(s) of {config.rank}×{config.rank} per attention layer, strategy
{config.strategy.upper()}, steering {", ".join(config.steer)}; {parameters:,} parameters. The backbone is frozen and
not included. Method: arXiv 2605.12357.

```python
from transformers import AutoModelForCausalLM
from deltamem import DeltaMemModel

base = AutoModelForCausalLM.from_pretrained("{base}")
model = DeltaMemModel.from_pretrained(base, "path/to/this/folder")
memory = model.write(input_ids)                  # tokens to remember
out = model.generate(question_ids, memory=memory)
```
"""
