"""Runs a command and says how long it took and how much memory its processes held at most, all together.

    python3 .ci/measure.py LABEL COMMAND...

Memory is the sum of the proportional set sizes (shared pages count once) of all processes that the command
started, sampled every second; it is left out where there is no /proc. Exits with the command's exit code.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

TAG = "MEASURED_BY"


def processes(tag: str) -> list[Path]:
    """Processes that inherited the tag: unlike parentage, it survives the parent's end."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TAG}={tag}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def proportional_set_bytes(folder: Path) -> int:
    try:
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> int:
    label, *command = sys.argv[1:]
    tag = f"{os.getpid()}-{time.time_ns()}"
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(1):
            peak = max(peak, sum(map(proportional_set_bytes, processes(tag))))

    sampler = threading.Thread(target=sample, daemon=True)
    start = time.monotonic()
    sampler.start()
    code = subprocess.run(command, env={**os.environ, TAG: tag}, check=False).returncode
    ended.set()
    sampler.join()
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    memory = f", peak memory {peak / 2**30:.2f} GiB" if peak else ""
    outcome = f"failed ({code})" if code else "ok"
    print(f"== {label}: {outcome} in {minutes} min {seconds:02d} s{memory}", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
