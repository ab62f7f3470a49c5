"""Hosts on one machine: namespaces with processes and an address of their own, joined by a bridge, that share all
folders but one."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


class Host:
    """What is started in it sees this host's address and the others', and no processes but this host's.

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
        _ip(f"link set {self._wire} master {bridge}")
        _ip(f"-n {self.name} addr add {self.address}/24 dev eth0")
        _ip(f"-n {self.name} link set eth0 up")
        _ip(f"-n {self.name} link set lo up")
        self.gets_power()

    def gets_power(self) -> None:
        """Starts it, with nothing that ran on it before."""
        _ip(f"link set {self._wire} up")
        # whose mounts nobody else sees; with its first process, which reaps what others leave, all of them end
        first = 'set -e; mount --bind "$0" "$1"; echo up; sleep infinity & wait'
        self._power = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", first, str(self._mounted), str(self.own)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._power.stdout is not None
        with self._power.stdout as said:
            assert said.readline() == "up\n", f"{self.name} didn't start"
        (self._first,) = psutil.Process(self._power.pid).children()

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """Starts a program here; what it says goes to the end of a file."""
        with log.open("a") as said:
            return subprocess.Popen(
                ["nsenter", f"--target={self._first.pid}", "--mount", "--net", "--pid", "--wdns=" + str(log.parent),
                 "--", *command],
                env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def loses_power(self) -> None:
        """Ends everything here at once; the others aren't told, not even by the end of a connection."""
        _ip(f"link set {self._wire} down")
        self._end()

    def starts_anew(self) -> None:
        self.loses_power()
        self.gets_power()

    def runs(self, module: str) -> bool:
        """Whether a `python -m MODULE` is running here."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(int(pid)).cmdline()[1:3] == ["-m", module]:
                    return True
        return False

    def remove(self) -> None:
        self._end()
        _ip(f"link del {self._wire}")  # with its namespace it would go later, and keep the next host from its name
        _ip(f"netns del {self.name}")

    def _end(self) -> None:
        self._power.kill()
        self._power.wait()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._first.wait()  # until the kernel has ended all others


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
