"""Where backbones and episodes come from, in words for the report's last part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pipelines.config.backbones import Backbone


def backbone_source(entry: Backbone) -> str:
    """Such as "hub: org/name"."""
    named = (getattr(entry, key, None) for key in ("id", "path", "package"))
    return ": ".join([entry.source, *(str(name) for name in named if name)])


def backbone_loading(entry: Backbone) -> str:
    """As what its weights are loaded, such as "bfloat16, quantised by torchao"."""
    quantisation = getattr(entry, "quantization", None)
    return f"{entry.dtype}, quantised by {quantisation['quant_method']}" if quantisation else entry.dtype


def data_source(manifest: Mapping[str, Any]) -> str:
    """Where a manifest's episodes, or one source's part of them, are from."""
    origin = manifest.get("source")
    if not isinstance(origin, Mapping):
        return "–"
    if "hub" in origin:
        at = origin.get("revision") or origin.get("commit")
        words = f"hub: {origin['hub']}" + (f" at {at}" if at else "")
    elif "generated" in origin:
        words = f"generated, seed {origin['generated'].get('seed', 0)}"
    else:
        words = ", ".join(PurePath(file["path"]).name for file in origin.get("files", ()))
    return f"{words}; a held-out share of {origin['held_out']:g}" if "held_out" in origin else words
