"""What is written down of a prepared backbone, read without loading what reads the backbone itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.run.files import read_record

RECORD = "backbone.json"


def backbone_record(folder: Path) -> dict[str, Any]:
    """What `prepare_backbone` recorded of a backbone folder. Raises StageError if it isn't complete."""
    return read_record(folder / RECORD, f"{folder} is not a complete backbone folder. {make_anew(folder)}")


def backbone_digest(folder: str | Path) -> str:
    """The digest (sha256 hex) that `folder` got when it was prepared."""
    return backbone_record(Path(folder))["digest"]


def make_anew(folder: Path) -> str:
    """What to do about a folder that is damaged."""
    return f"Remove it and run `python -m pipelines.backbone --config CONFIG --backbone {folder.name}` again."
