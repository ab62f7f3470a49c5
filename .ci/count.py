"""Counts how a checkout's code lies: `make count`, or `python .ci/count.py FOLDER` for another checkout.

Per folder its modules, their lines and the longest function; then import circles, long files, and places that are
written more than once. Docstrings, comments and layout don't count as written twice.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grimp
import networkx
from rich.console import Console
from rich.table import Table

PACKAGES = {"deltamem": "deltamem", "deltamem_kernels": "kernels/deltamem_kernels", "pipelines": "pipelines"}
LONG_FILE = 300
SAME_LINES = 4
"""Statements, one a line, that make a place when another place has the same in sequence."""


def functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(Lines, name) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name


def statements(tree: ast.Module) -> list[str]:
    """The code one statement a line, without docstrings and imports."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                each
                for each in body
                if not isinstance(each, ast.Import | ast.ImportFrom)
                and not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ] or [ast.Pass()]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


def repeated(code: dict[str, list[str]]) -> list[str]:
    """ "file (lines)" of every place whose statements stand elsewhere, too."""
    windows = {
        path: [tuple(lines[at : at + SAME_LINES]) for at in range(len(lines) - SAME_LINES + 1)]
        for path, lines in code.items()
    }
    often = Counter(window for each in windows.values() for window in each)
    places = []
    for path, each in windows.items():
        same = [at for at, window in enumerate(each) if often[window] > 1]
        starts = same[:1] + [after for before, after in pairwise(same) if after > before + SAME_LINES]
        places += [f"{path}: {each[start][0]}" for start in starts]
    return places


def circles(root: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Groups of modules, and of neighbouring folders and modules, that import each other all round."""
    sys.path[:0] = [str(root), str(root / "kernels")]
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    edges = [(name, found) for name in graph.modules for found in graph.find_modules_directly_imported_by(name)]
    rooms = set()
    for one, other in edges:
        mine, its = one.split("."), other.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), None)
        if shared:  # neighbours below a common folder
            rooms.add((".".join(mine[: shared + 1]), ".".join(its[: shared + 1])))
    return tuple(
        [sorted(group) for group in networkx.strongly_connected_components(networkx.DiGraph(each)) if len(group) > 1]
        for each in (edges, sorted(rooms))
    )


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    console = Console()
    table = Table("folder", "modules", "lines", "longest file", "functions", "longest function")
    folders, code, long_files = defaultdict(list), {}, []
    for path in sorted(path for name in PACKAGES.values() for path in (root / name).rglob("*.py")):
        folders[path.parent.relative_to(root)].append(path)
    for folder, paths in folders.items():
        lengths, found = {}, []
        for path in paths:
            text = path.read_text(encoding="utf-8")
            tree, lengths[path] = ast.parse(text), len(text.splitlines())
            found += functions(tree)
            code[str(path.relative_to(root))] = statements(tree)
        longest, (lines, name) = max(lengths, key=lengths.get), max(found, default=(0, "–"))
        long_files += [f"{path.relative_to(root)} ({n})" for path, n in lengths.items() if n > LONG_FILE]
        row = (folder, len(paths), sum(lengths.values()), f"{longest.name} {lengths[longest]}", len(found))
        table.add_row(*map(str, row), f"{name} {lines}")
    console.print(table)
    of_modules, of_folders = circles(root)
    for what, found in (
        ("circles of modules", [" ↔ ".join(group) for group in of_modules]),
        ("circles of folders", [" ↔ ".join(group) for group in of_folders]),
        (f"files over {LONG_FILE} lines", long_files),
        (f"places of {SAME_LINES} statements that stand elsewhere, too", repeated(code)),
    ):
        console.print(f"{what}: {len(found)}", highlight=False)
        for each in found:
            console.print(f"  {each}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
