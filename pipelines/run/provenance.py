"""What an artefact was made from: configuration, code, libraries, machine."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.config import config_hash

LIBRARIES = (
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "datasets",
    "pyarrow",
    "mlflow",
    "snakemake",
    "peft",
    "triton",
    "numpy",
)
_ROOT = Path(__file__).resolve().parents[2]


def provenance(config_part: Any) -> dict[str, Any]:
    """Record to be kept with every artefact; ``config_part`` is the part of the configuration that made it.

    Holds config_hash (sha256 hex), code {commit (None outside a git checkout), dirty}, libraries {name:
    version of those installed}, python and platform.
    """
    return {
        "config_hash": config_hash(config_part),
        "code": code_version(),
        "libraries": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def code_version() -> dict[str, Any]:
    """The project's commit, and whether its tracked files differ from it."""
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    return {"commit": commit or None, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


@functools.cache
def library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str:
    # a status that is cut off would leave its lock, and git would refuse the user's next commit
    command = ["git", "--no-optional-locks", *arguments]
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
