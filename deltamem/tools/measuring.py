"""The one measure of time and of peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

# getrusage counts kilobytes, on macOS bytes
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def seconds_now(device: torch.device) -> float:
    """Seconds of a clock that only runs forward, once the device has done all it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Measure the peak anew from here; on a CPU it stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use: of the device since :func:`reset_peak`, on a CPU of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
