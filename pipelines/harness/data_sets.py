"""Where the harness's tasks have their data from, without loading any."""

from __future__ import annotations

import re
from pathlib import Path

import lm_eval.tasks


def data_set_of(task: str) -> str | None:
    """The Hub id of a task's data; None where the harness has no file of the task's name or the file names none."""
    found = next(Path(lm_eval.tasks.__file__).parent.rglob(f"{task}.yaml"), None)
    while found is not None and found.is_file():
        text = found.read_text(encoding="utf-8")  # not YAML that a plain loader reads: it names functions
        if path := re.search(r"^dataset_path:\s*['\"]?([\w./-]+)", text, re.MULTILINE):
            return path[1]
        include = re.search(r"^include:\s*['\"]?([\w./-]+)", text, re.MULTILINE)
        found = found.parent / include[1] if include else None
    return None
