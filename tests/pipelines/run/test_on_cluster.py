"""Commands on a Ray cluster of this machine, with two GPUs that it only counts."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.errors import StageError
from pipelines.run.on_cluster import check_reachable
from tests.ray_head import ray_head

HOLDS = """
import os, sys, time
from pathlib import Path
mine, go = Path(sys.argv[1]), Path(sys.argv[2])
print("on", os.environ.get("CUDA_VISIBLE_DEVICES"))
mine.write_text(str(os.getpid()))
while not go.exists():
    time.sleep(0.05)
print("done")
sys.exit(7)
"""
"""Says which GPU it has, waits for a file, and ends with an exit code of its own."""


@pytest.fixture(scope="module")
def head():
    with ray_head("--num-cpus=8", "--num-gpus=2") as found:
        yield found


class Job:
    """A command on the cluster that holds its GPUs until ``go`` is there."""

    def __init__(self, head, folder, name, gpus):
        self.alive, self.go = folder / name, folder / "go"
        command = [sys.executable, "-m", "pipelines.run.on_cluster", head.address, str(gpus)]
        command += [sys.executable, "-c", HOLDS, str(self.alive), str(self.go)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def pid(self) -> int:
        """Of the command, once it runs."""
        while not (self.alive.exists() and self.alive.read_text()):
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.05)
        return int(self.alive.read_text())


def ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.slow
def test_shares_are_packed_lines_come_back_and_what_is_cancelled_ends_alone(head, tmp_path):
    halves = [Job(head, tmp_path, f"half{n}", 0.5) for n in range(2)]
    pids = [job.pid() for job in halves]
    whole = Job(head, tmp_path, "whole", 1)
    pids.append(whole.pid())
    # while they run, and each on a GPU of its own or shared with its like
    places = [job.process.stdout.readline().split() for job in (*halves, whole)]
    assert places[0] == places[1] != places[2] and {place[0] for place in places} == {"on"}

    waits = Job(head, tmp_path, "waits", 1)
    for job, how in ((halves[0], signal.SIGTERM), (whole, signal.SIGKILL)):
        job.process.send_signal(how)
        assert job.process.wait() != 0
    deadline = time.monotonic() + 60
    while not (ended(pids[0]) and ended(pids[2])):
        assert time.monotonic() < deadline, "a command outlived what had started it"
        time.sleep(0.1)
    waits.pid()  # has the GPU that came free
    assert not ended(pids[1])
    (tmp_path / "go").touch()
    for job in (halves[1], waits):
        said, _ = job.process.communicate()
        assert (said.splitlines()[-1], job.process.returncode) == ("done", 7), said


@pytest.mark.slow
def test_a_command_whose_node_dies_is_run_again(head, tmp_path):
    job = Job(head, tmp_path, "job", 0)
    first = job.pid()
    job.alive.unlink()
    psutil.Process(first).parent().kill()  # the worker process of Ray
    second = job.pid()
    assert second != first
    (tmp_path / "go").touch()
    said, _ = job.process.communicate()
    assert "the Ray cluster lost this job" in said and job.process.returncode == 7, said
    assert ended(first)


@pytest.mark.slow
def test_what_no_node_has_is_said(head, tmp_path):
    job = Job(head, tmp_path, "job", 4)
    assert "4 GPUs were asked for and no node of the Ray cluster has so many" in job.process.communicate()[0]
    assert job.process.returncode == 1


@pytest.mark.slow
def test_a_cluster_with_another_token_is_not_taken_for_one_that_is_gone():
    token, tries = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}, {"RAY_NUM_REDIS_GET_RETRIES": "1"}
    with ray_head("--num-cpus=1", **token) as head:
        command = [sys.executable, "-m", "pipelines.run.on_cluster", head.address, "0", "true"]
        refused = subprocess.run(command, env={**os.environ, **tries}, capture_output=True, text=True)
    assert refused.returncode == 1 and f"the Ray cluster at {head.address} asks for a token" in refused.stderr


def test_a_cluster_that_does_not_answer_is_named():
    with pytest.raises(StageError, match="train.ray_address: no Ray cluster at 127.0.0.1:1"):
        check_reachable("127.0.0.1:1")
