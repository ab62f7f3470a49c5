"""The site builds from what is in the checkout, without a warning, and shows every room."""

import os
import re
import subprocess
import sys

import pytest

from tests.paths import PROJECT

REFERENCE = "".join(page.read_text(encoding="utf-8") for page in sorted((PROJECT / "docs/reference").glob("*.md")))


FETCHED = re.compile(
    r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]* href="(?:https?:)?//'
)


def test_the_site_builds_without_a_warning_and_is_read_without_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text("utf-8") for page in tmp_path.rglob("*.html")}
    assert "does it remember?" in pages["index.html"] and "What it can't do" in pages["index.html"]
    api = pages["reference/deltamem/index.html"]
    assert 'id="deltamem.model.DeltaMemModel.write"' in api and ":meth:" not in api
    assert [name for name, page in pages.items() if FETCHED.search(page)] == []


@pytest.mark.parametrize("package", ["deltamem", "pipelines"])
def test_every_room_has_its_api_page(package):
    rooms = {f"{package}.{file.parent.name}" for file in (PROJECT / package).glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))
