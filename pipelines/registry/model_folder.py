"""The folder that a registered δ-mem adapter is in MLflow: the adapter's files, and how MLflow loads them."""

from __future__ import annotations

import json
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
EXAMPLE = {"messages": [{"role": "user", "content": "The codename of Velora is tiger. What is it?"}], "max_tokens": 32}
EXAMPLE_FILE = "input_example.json"


def write_model_folder(adapter: Path, backbone: Path, digest: str, target: Path) -> None:
    """Writes to ``target`` the adapter's files and an MLmodel file that names loader and backbone."""
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copy(adapter / name, target / name)
    # Without a schema of its parameters MLflow drops them all; with one of its inputs it makes a table of whatever is
    # asked, and refuses what isn't one. So an example says what the inputs are like.
    schema = ParamSchema([ParamSpec(name, kind, None) for name, kind in PARAMS.items()])
    (target / EXAMPLE_FILE).write_text(json.dumps(EXAMPLE, indent=2) + "\n", encoding="utf-8")
    example = {"artifact_path": EXAMPLE_FILE, "serving_input_path": EXAMPLE_FILE, "type": "json_object"}
    model = Model(signature=ModelSignature(params=schema), saved_input_example_info=example)
    settings = {"backbone": str(backbone.resolve()), "backbone_digest": digest, "max_new_tokens": MAX_NEW_TOKENS}
    mlflow.pyfunc.add_to_model(model, loader_module=LOADER, model_config=settings)
    model.save(str(target / "MLmodel"))
