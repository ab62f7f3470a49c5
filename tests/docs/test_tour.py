"""The tour of the rooms in CONTRIBUTING.md is a tour of the folders."""

import re

from tests.docs.pages import PAGES
from tests.paths import PROJECT

TOUR = re.search(r"^```\n(deltamem/.*?)^```$", (PROJECT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S).group(1)


def shown() -> list[str]:
    """The folders of the tour, whose names are indented by two spaces for each folder above."""
    folders, path = [], []
    for line in TOUR.splitlines():
        indent, name = re.match(r"( *)(\w+)/ ", line).groups()
        path = [*path[: len(indent) // 2], name]
        folders.append("/".join(path))
    return folders


def test_every_folder_of_the_tour_is_there():
    assert [name for name in shown() if not (PROJECT / name).is_dir()] == []


def test_every_room_is_on_the_tour():
    packages = (
        file.parent for top in ("deltamem", "kernels", "pipelines") for file in (PROJECT / top).rglob("__init__.py")
    )
    others = (path for top in ("configs", "workflow") for path in (PROJECT / top).iterdir() if path.is_dir())
    rooms = {path.relative_to(PROJECT).as_posix() for path in [*packages, *others]}
    assert rooms - set(shown()) == set()


def test_every_file_that_the_pages_name_is_there():
    pattern = r"`((?:deltamem|kernels|pipelines|workflow|configs|benchmarks|examples|docs|tests)/[\w./-]*)`"
    for page in PAGES:
        named = [name for name in re.findall(pattern, page.read_text(encoding="utf-8")) if "NAME" not in name]
        assert [name for name in named if not (PROJECT / name).exists()] == [], page


def test_the_tests_that_a_page_names_are_there():
    named = {pair for page in PAGES for pair in re.findall(r"`([\w/]+/test_\w+)::(\w+)`", page.read_text("utf-8"))}
    tests = {file: (PROJECT / f"tests/{file}.py").read_text("utf-8") for file, _ in named}
    assert len(named) > 30 and [pair for pair in named if f"def test_{pair[1]}(" not in tests[pair[0]]] == []
