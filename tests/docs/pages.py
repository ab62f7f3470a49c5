"""The pages, and what they show in fenced blocks."""

import re
import shlex
from pathlib import Path

from tests.paths import PROJECT

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PROJECT / "configs/README.md",
         *sorted(path for path in (PROJECT / "docs").rglob("*.md") if not path.is_symlink())]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line that a page shows, in words."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.replace("\\\n", "").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def run(name: str, names: dict[str, str]) -> dict:
    """Runs a page's Python from top to bottom, names in it replaced by what a test has; returns its variables."""
    scope = {}
    for block in blocks(PROJECT / name, "python"):
        for shown, ours in names.items():
            block = block.replace(f'"{shown}"', f'"{ours}"')
        exec(compile(block, name, "exec"), scope)
    return scope


def printed(name: str) -> str:
    """What a page's Python prints, by what stands beside its calls."""
    lines = [line for block in blocks(PROJECT / name, "python") for line in block.splitlines()]
    return "".join(f"{line.partition('  # ')[2]}\n" for line in lines if line.startswith("print("))
