"""What artefacts record of their making."""

import json
import os
import subprocess

from pipelines.config import config_hash
from pipelines.run import provenance as module
from pipelines.run.provenance import code_version, provenance


def git(folder, *arguments):
    settings = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    result = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return result.stdout.strip()


def test_a_record_is_json_with_hash_and_versions():
    record = provenance({"a": 1})
    assert json.loads(json.dumps(record)) == record
    assert record["config_hash"] == config_hash({"a": 1})
    assert {"torch", "transformers"} <= set(record["libraries"])


def test_commit_and_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert code_version() == {"commit": None, "dirty": False}
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    assert code_version() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert code_version()["dirty"] is True


def test_the_checkouts_index_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    index = (tmp_path / ".git/index").read_bytes()
    os.utime(tmp_path / "code.py", (0, 0))  # git status would note the new time in its index, under a lock
    code_version()
    assert (tmp_path / ".git/index").read_bytes() == index
