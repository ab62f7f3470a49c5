"""Hosts on one machine: network namespaces with an address each, joined by a bridge, that share all folders but one."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


class Host:
    """A network namespace. What is started in it sees this host's address and the others' alone.

    Attributes:
        own: a folder of which every host sees one of its own.
    """

    def __init__(self, bridge: str, number: int, folder: Path) -> None:
        self.own, self._mounted = folder / "own", folder / str(number)
        self._mounted.mkdir()
        self.name, self.address = f"{bridge}-{number}", f"10.231.77.{number + 1}"
        self._wire = f"{bridge}w{number}"
        _ip(f"netns add {self.name}")
        _ip(f"link add {self._wire} type veth peer name eth0 netns {self.name}")
        _ip(f"link set {self._wire} master {bridge} up")
        _ip(f"-n {self.name} addr add {self.address}/24 dev eth0")
        _ip(f"-n {self.name} link set eth0 up")
        _ip(f"-n {self.name} link set lo up")

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """Starts a program here; what it says goes to the end of a file."""
        with log.open("a") as said:
            return subprocess.Popen(
                # whose mounts nobody else sees
                ["ip", "netns", "exec", self.name, "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"',
                 str(self._mounted), str(self.own), *command],
                env={**os.environ, **environment}, cwd=log.parent, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def loses_power(self) -> None:
        """Ends everything here at once; the others aren't told, not even by the end of a connection."""
        _ip(f"link set {self._wire} down")
        self.kill()

    def gets_power(self) -> None:
        _ip(f"link set {self._wire} up")

    def runs(self, module: str) -> bool:
        """Whether a `python -m MODULE` is running here."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:3] == ["-m", module]:
                    return True
        return False

    def remove(self) -> None:
        self.kill()
        _ip(f"link del {self._wire}")  # with its namespace it would go later, and keep the next host from its name
        _ip(f"netns del {self.name}")

    def kill(self) -> None:
        """Ends everything here."""
        while left := self._processes():  # until none has had the time to start another
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    def _processes(self) -> list[psutil.Process]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        found = []
        for pid in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many; at the end nothing of them is left. Skips the test where they can't be made."""
    bridge = f"dm{os.getpid()}"
    tried = ["ip", "link", "add", bridge, "type", "bridge"]
    try:
        made = subprocess.run(tried, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs iproute2, for network namespaces")
    if made.returncode:
        pytest.skip(f"needs the right to make network namespaces: {made.stderr.strip()}")
    found: list[Host] = []
    folder = Path(f"/tmp/{bridge}")  # short, as the paths of sockets are limited
    (folder / "own").mkdir(parents=True)
    try:
        _ip(f"link set {bridge} up")
        for number in range(count):
            found.append(Host(bridge, number, folder))
        yield found
    finally:
        for host in found:
            host.remove()
        _ip(f"link del {bridge}")
        shutil.rmtree(folder)
