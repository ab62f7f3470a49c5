"""Keeps from the tests what a user has: settings in the environment, files in the home folder, caches, a proxy."""

import os
import site
from pathlib import Path

from tests.paths import PROJECT

SETTINGS_OF = (
    "DELTAMEM", "GIT", "HF", "HUGGINGFACE", "MLFLOW", "NLTK", "OPENAI", "PYTORCH", "RAY", "SNAKEMAKE", "TIKTOKEN",
    "TORCH", "TRANSFORMERS", "XDG",
)  # fmt: skip
"""First words of the names of variables that a library or this project reads."""

TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "MPLBACKEND", "MPLCONFIGDIR")


def isolate(environment: dict[str, str] | os._Environ, home: Path) -> None:
    """Changes ``environment`` so that tests and what they start behave alike on every machine and account."""
    for name in [name for name in environment if name.partition("_")[0] in SETTINGS_OF or name in TERMINAL]:
        del environment[name]
    packages_of_the_user = site.getuserbase()
    environment.update(
        {
            "HOME": str(home),
            "PYTHONUSERBASE": packages_of_the_user,
            "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
    )
