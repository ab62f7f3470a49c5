"""The folder that a registered δ-mem adapter is in MLflow: the adapter's files, and how MLflow loads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ParamSchema, ParamSpec

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
LOADER = "pipelines.pyfunc"
"""The module that MLflow loads such a folder with; folders registered long ago name it too."""
PARAMS = {"max_new_tokens": "long", "temperature": "double", "top_p": "double", "seed": "long"}
"""What the loaded model's predict() takes beside the messages, and MLflow's name for its type."""
MAX_NEW_TOKENS = 512
"""Longest reply where a call doesn't say."""


def write_model_folder(adapter: Path, backbone: Path, digest: str, target: Path) -> None:
    """Writes to ``target`` the adapter's files and an MLmodel file that names loader and backbone."""
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copy(adapter / name, target / name)
    # without a schema of its parameters MLflow drops them all
    schema = ParamSchema([ParamSpec(name, kind, None) for name, kind in PARAMS.items()])
    model = Model(signature=ModelSignature(params=schema))
    settings = {"backbone": str(backbone.resolve()), "backbone_digest": digest, "max_new_tokens": MAX_NEW_TOKENS}
    mlflow.pyfunc.add_to_model(model, loader_module=LOADER, model_config=settings)
    model.save(str(target / "MLmodel"))
