"""A trace of some training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


def start_profiler(steps: int, trace: Path) -> profile:
    """A started profiler that is told of every step; the first two, which compile and warm up, are left out.

    Args:
        trace: file that is written after that many further steps, or at the profiler's stop.
    """
    trace.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(trace)),
    )
    profiler.start()
    return profiler
