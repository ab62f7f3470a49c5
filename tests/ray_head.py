"""A real Ray head on this machine, that no other program finds."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class Head(NamedTuple):
    """Where it answers: programs, and submitted jobs; and its process."""

    address: str
    jobs: str
    process: subprocess.Popen


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ray_head(*options: str, **environment: str) -> Iterator[Head]:
    """Starts one, with options of `ray start`; at the end nothing of it is left."""
    # the temporary folder is short, because socket paths are limited, and not Ray's own, where other programs would
    # find this cluster
    folder, port, jobs = Path(f"/tmp/dm{os.getpid()}"), free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={jobs}", f"--temp-dir={folder}", "--object-store-memory=80000000"]
    command += ["--dashboard-agent-listen-port=0"]  # by default one port a machine: a second Ray would take no jobs
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise RuntimeError(f"Ray didn't start: {''.join(said)}")
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{jobs}", process)
    finally:
        running = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        started = {*running, *_with_files_in(folder)}
        process.terminate()
        process.communicate()
        for left in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _with_files_in(folder: Path) -> list[psutil.Process]:
    """The processes of Ray that were told to keep files there: they outlive a start that failed."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(f"{folder}/" in word for word in process.cmdline()):
                found.append(process)
    return found
