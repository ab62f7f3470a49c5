"""What libraries read from the environment when imported, or start processes with; how large ones are imported.

The rooms that bring in such a library call these functions in their ``__init__``, which runs before any module of
theirs. A value that the user has set stays.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Generator


def for_training() -> None:
    """Ray's."""
    _default("RAY_USAGE_STATS_ENABLED", "0")
    _default("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every print of a worker appears twice
    _default("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a controller that notices reports and deaths quickly
    _default("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # on a cluster that is full it is started anew then
    _default("RAY_worker_niceness", "0")  # the workers are the work; by default they give way to everything
    _default("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray never sets the devices of workers without a GPU
    # A process for every CPU, started early for whoever may need it. Ray Train can't: its have variables of their own.
    _default("RAY_prestart_worker_first_driver", "0")
    # A process that tells the loop of nodes about to go. Ours doesn't ask: it goes on from its last checkpoint.
    _default("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def for_deepspeed() -> None:
    """DeepSpeed's, which looks for a device when it is imported, and warns of none.

    With it comes MLflow where that is installed, for most of a second and unused: the class of its settings imports its
    autotuner, which tries to, and nothing turns that off.
    """
    for_registry()
    import torch

    if not torch.cuda.is_available():
        _default("DS_ACCELERATOR", "cpu")


def for_registry() -> None:
    """MLflow's."""
    _default("MLFLOW_DISABLE_TELEMETRY", "true")
    _default("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")  # a store that is away is waited for a minute, not for four


@contextlib.contextmanager
def loading() -> Generator[None]:
    """For importing large libraries: what they make stays, and isn't looked through for garbage time and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _default(name: str, value: str) -> None:
    os.environ.setdefault(name, value)
