"""A model from the options that the commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from deltamem.errors import DeltaMemError


def home(path: Any) -> Any:
    """A text or Path whose ~ is the user's folder: shells leave it as it is behind an equals sign (--store=~/x)."""
    return path if path is None else type(path)(os.path.expanduser(path))


BaseOption = Annotated[
    str | None, typer.Option(callback=home, help="Backbone: a folder or a Hub id. Default: the one the adapter names.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        callback=home, help="Adapter: a folder (also of the public release), a Hub id, or models:/NAME@ALIAS."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Registered adapter, models:/NAME@ALIAS or models:/NAME/VERSION; it names its backbone."),
]
RegistryOption = Annotated[
    str | None,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI",
        show_envvar=True,
        help="MLflow store that models:/ addresses are looked up in, e.g. sqlite:///results/mlflow.db.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Most tokens of prompt and reply; beyond it old turns stay in the memory only. Default: the backbone's.",
    ),
]
StrengthOption = Annotated[
    float, typer.Option(help="How strongly the memory steers: 1 as trained, 0 the frozen model.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Device, e.g. cuda or cpu. Default: a GPU if there is one.")]
DtypeOption = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


class Named(NamedTuple):
    """What a command is to work with: the adapter's folder, and its backbone."""

    folder: Path
    base: str
    revision: str | None


def find(base: str | None, adapter: str | None, model: str | None, registry: str | None = None) -> Named:
    """The adapter and its backbone; the arguments are the options above, None where not given.

    Raises:
        DeltaMemError: a part isn't named or can't be had.
    """
    name = adapter or model
    if name is None or (adapter and model):
        raise DeltaMemError("name the adapter: either --adapter (with --base) or --model models:/…")

    from deltamem.adapters.files import load_adapter
    from deltamem.adapters.locate import locate, registered_backbone

    folder = locate(name, registry)
    revision = None
    if base is None:
        base = registered_backbone(folder)
        if base is None:
            config, _ = load_adapter(folder)
            base, revision = config.base_model_name_or_path, config.revision
        if base is None:
            raise DeltaMemError(f"the adapter {folder} doesn't say which backbone it was made for: name it with --base")
    return Named(folder, base, revision)


def load(
    base: str | None,
    adapter: str | None,
    model: str | None,
    device: str | None,
    dtype: str,
    registry: str | None = None,
):
    """(DeltaMemModel, tokenizer) in eval mode; the arguments are the options above, None where not given.

    Raises:
        DeltaMemError: a part isn't named or can't be had.
    """
    check_dtype(dtype)
    return load_named(find(base, adapter, model, registry), device, dtype)


def check_dtype(dtype: str) -> None:
    """Raise DeltaMemError if the option names none."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise DeltaMemError(f"--dtype {dtype}: choose auto, float32, bfloat16 or float16")


def load_named(named: Named, device: str | None, dtype: str):
    """(DeltaMemModel, tokenizer) in eval mode.

    Raises:
        DeltaMemError: a part can't be had.
    """
    from deltamem.model import DeltaMemModel

    backbone, tokenizer = load_backbone(named.base, named.revision, device, dtype)
    return DeltaMemModel.from_pretrained(backbone, named.folder), tokenizer


def load_backbone(base: str, revision: str | None, device: str | None, dtype: str):
    """(transformers' model, tokenizer) in eval mode.

    Raises:
        DeltaMemError: it can't be had.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from deltamem.backbone.facts import computed_dtype

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        backbone = AutoModelForCausalLM.from_pretrained(
            base,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        if dtype == "auto":
            backbone = backbone.to(computed_dtype(backbone.dtype, device))
        backbone = backbone.to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        told = str(error)
        if not Path(base).is_dir():
            told = f"there is no such folder, and as a Hub id: {told.rstrip('.')}; name the backbone with --base"
        raise DeltaMemError(f"the backbone {base} can't be loaded on {device}: {told}") from error
    return backbone, tokenizer
