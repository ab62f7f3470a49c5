"""The site builds from what is in the checkout, without a warning, and shows every room."""

import os
import re
import subprocess
import sys

import pytest

from tests.paths import PROJECT

REFERENCE = "".join(page.read_text(encoding="utf-8") for page in sorted((PROJECT / "docs/reference").glob("*.md")))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_the_readme_and_the_api_are_on_the_site(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "does it remember?" in home and "What it can't do" in home
    api = (site / "reference/deltamem/index.html").read_text(encoding="utf-8")
    assert 'id="deltamem.model.DeltaMemModel.write"' in api
    assert "segment_ids" in api and ":meth:" not in api


def test_a_reader_without_network_sees_everything(site):
    fetched = (
        r'<(?:script|img|iframe)[^>]* src="((?:https?:)?//[^"]+)|<link[^>]* rel="stylesheet"[^>]*href="(http[^"]+)'
    )
    for page in site.rglob("*.html"):
        assert not re.search(fetched, page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("package", ["deltamem", "pipelines"])
def test_every_room_has_its_api_page(package):
    rooms = {f"{package}.{file.parent.name}" for file in (PROJECT / package).glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))
