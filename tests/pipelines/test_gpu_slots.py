"""Sharing GPUs between jobs, with made-up GPU ids: only their names and the locks matter."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.gpu_slots import claim, visible_gpus


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")


def test_visible_gpus_follow_the_environment(monkeypatch):
    for value, expected in (
        ("3,5", ["3", "5"]),
        ("", []),
        ("-1", []),
        ("GPU-ab, GPU-cd", ["GPU-ab", "GPU-cd"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == expected


def test_claims_don_t_overlap(gpus, tmp_path):
    with claim(1, tmp_path) as first, claim(2, tmp_path) as second:
        assert sorted(first + second) == ["3", "5", "7"]
    with claim(9, tmp_path) as every:
        assert every == ["3", "5", "7"], "no more than there are"


def test_a_claim_waits_for_a_free_gpu(gpus, tmp_path):
    got = threading.Event()

    def take() -> None:
        with claim(2, tmp_path):
            got.set()

    with claim(2, tmp_path):
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not got.wait(1.0)
    waiting.join(timeout=30)
    assert got.is_set()


@pytest.mark.parametrize(("count", "seen"), [(2, "3,5"), (0, "3,5,7")])
def test_the_command_sees_its_gpus_and_gives_its_exit_code(gpus, count, seen, tmp_path):
    program = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(7)"
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.gpu_slots", str(count), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert (result.stdout.strip(), result.returncode) == (seen, 7), result.stderr
