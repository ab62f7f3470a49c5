"""Sharing GPUs between jobs, with made-up GPU ids: only their names and the locks matter."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipelines.run.gpu_slots import _taken, claim, thousandths, visible_gpus


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
    with claim(1000, tmp_path) as first, claim(2000, tmp_path) as second:
        assert sorted(first + second) == ["3", "5", "7"]
    with claim(9000, tmp_path) as every:
        assert every == ["3", "5", "7"], "no more than there are"


def test_shares_fill_one_gpu_before_the_next_and_leave_whole_ones_free(gpus, tmp_path):
    with contextlib.ExitStack() as held:
        quarters = [held.enter_context(claim(250, tmp_path)) for _ in range(5)]
        assert quarters == [["3"]] * 4 + [["5"]]
        assert held.enter_context(claim(500, tmp_path)) == ["5"]
        assert held.enter_context(claim(1000, tmp_path)) == ["7"]
        assert held.enter_context(claim(250, tmp_path)) == ["5"]
    with claim(3000, tmp_path) as every:
        assert len(every) == 3, "everything was given back"


def test_a_dead_jobs_share_is_free_again(gpus, tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from pipelines.run.gpu_slots import claim\n"
        "with claim(3000, Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert died.returncode == -signal.SIGKILL and len(list(tmp_path.glob("*.held"))) == 3
    with claim(3000, tmp_path) as every:
        assert len(every) == 3


@pytest.mark.parametrize("parts", range(1, 17))
def test_as_many_jobs_as_a_share_promises_fit_a_gpu(parts):
    assert parts * thousandths(1 / parts) <= 1000 < (parts + 1) * thousandths(1 / parts)
    assert thousandths(float(parts)) == 1000 * parts


def test_a_claim_waits_for_a_free_gpu(gpus, tmp_path):
    got = threading.Event()

    def take() -> None:
        with claim(2000, tmp_path):
            got.set()

    with claim(2000, tmp_path):
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not got.wait(1.0)
    waiting.join()
    assert got.is_set()


@pytest.mark.parametrize(("count", "seen"), [(2000, "3,5"), (125, "3"), (0, "3,5,7")])
def test_the_command_sees_its_gpus_and_gives_its_exit_code(gpus, count, seen, tmp_path):
    program = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(7)"
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.run.gpu_slots", str(count), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (result.stdout.strip(), result.returncode) == (seen, 7), result.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_job_holds_its_gpus_no_longer_and_leaves_nothing_running(gpus, tmp_path, monkeypatch, how):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, alive = tmp_path / f"deltamem-gpu-slots-{os.getuid()}", tmp_path / "alive"
    program = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(600)"
    job = subprocess.Popen(
        [sys.executable, "-m", "pipelines.run.gpu_slots", "3000", sys.executable, "-c", program, str(alive)],
        stdout=subprocess.PIPE,
    )
    while not alive.exists():
        time.sleep(0.01)
    assert sum(_taken(folder, gpu) for gpu in "357") == 3000
    job.send_signal(how)
    assert job.stdout.read() == b"", "ends when the last process that could write has ended"
    assert job.wait() == -how
    assert sum(_taken(folder, gpu) for gpu in "357") == 0


def test_a_job_ends_with_what_started_it(tmp_path):
    alive = tmp_path / "alive"
    sleeps = "import sys, time; from pathlib import Path; Path(sys.argv[1]).touch(); time.sleep(600)"
    command = [sys.executable, "-m", "pipelines.run.gpu_slots", "0", sys.executable, "-c", sleeps, str(alive)]
    starts = "import subprocess, sys; subprocess.run(['bash', '-c', 'set -e; exec \"$@\"', '-', *sys.argv[1:]])"
    starter = subprocess.Popen([sys.executable, "-c", starts, *command], stdout=subprocess.PIPE)
    while not alive.exists():
        time.sleep(0.01)
    starter.kill()
    assert starter.stdout.read() == b"", "ends when the last process that could write has ended"
