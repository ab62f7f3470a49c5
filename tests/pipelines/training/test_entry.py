"""A training's start: every process loads what it needs, as one waits for the other."""

import subprocess
import sys

import pytest

LIBRARIES = ("transformers", "accelerate", "peft", "deepspeed", "mlflow", "scipy", "torch._dynamo")


@pytest.mark.parametrize(
    "module",
    ["pipelines.train", "pipelines.training.entry", "pipelines.backbones.record"],
    ids=["before Ray is started", "in Ray's processes between driver and worker", "for a backbone's digest"],
)
def test_nothing_that_only_a_model_needs_is_loaded(module):
    code = f"import {module}, sys; print(*(name for name in {LIBRARIES} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
