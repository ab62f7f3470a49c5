"""What a user has set and what lies in the checkout reaches no test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.isolation import SETTINGS_OF, TERMINAL
from tests.paths import PROJECT

WRITTEN_BY_USERS = [
    "results/quickstart/report/index.html",
    "data/qasper/train.json",
    "mlflow.db",
    "mlruns/0/meta.yaml",
    "deltamem-sessions/s/session.json",
]
SETTINGS = {
    "COLUMNS": "20",
    "FORCE_COLOR": "1",
    "GIT_DIR": "/nowhere",
    "HF_HOME": "/nowhere/hf",
    "HF_HUB_OFFLINE": "0",
    "HOME": "/nowhere",
    "MLFLOW_EXPERIMENT_NAME": "mine",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "RAY_ADDRESS": "http://127.0.0.1:9",
    "SNAKEMAKE_PROFILE": "/nowhere/profile",
    "TRANSFORMERS_CACHE": "/nowhere/transformers",
    "XDG_CACHE_HOME": "/nowhere/cache",
    "http_proxy": "http://127.0.0.1:9",
}
SENSITIVE = [
    "tests/test_isolation.py::test_nothing_of_the_users_is_in_sight",
    "tests/deltamem/adapters/test_files.py::test_an_empty_folder_and_a_name_nobody_has_are_errors",
    "tests/pipelines/run/test_provenance.py",
    "tests/pipelines/test_register.py::test_a_cell_becomes_a_run_and_a_version",
    "tests/workflow/test_planning.py::test_every_configuration_can_be_planned[quickstart-3]",
]


def test_nothing_of_the_users_is_in_sight():
    seen = {name for name in os.environ if name.partition("_")[0] in SETTINGS_OF or name in TERMINAL}
    assert not [name for name in seen if os.environ[name] == SETTINGS.get(name)]
    assert os.environ["HF_HUB_OFFLINE"] == "1" and Path.home() != Path(SETTINGS["HOME"])
    assert not Path.cwd().is_relative_to(PROJECT)
    assert not [name for name in WRITTEN_BY_USERS if Path(name).exists()]


@pytest.mark.slow
def test_a_used_checkout_and_a_users_settings_change_no_test(tmp_path):
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in ("configs", "deltamem", "kernels", "pipelines", "tests", "workflow"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in WRITTEN_BY_USERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a user's")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SENSITIVE]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **SETTINGS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
