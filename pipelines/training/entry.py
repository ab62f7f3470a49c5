"""What Ray Train runs on every worker.

Ray's own processes read this module and the task's as well, to hand them on. So both load nothing that only the worker
needs: one process waits for the other, and a second spent here is spent in each of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines import environment
from pipelines.run.files import room_to_write
from pipelines.training.task import WorkerTask


def work(settings: dict[str, Any]) -> None:
    """Trains as its "task" says, from the checkpoint "saved" where there is one."""
    environment.for_deepspeed()
    with environment.loading():
        from pipelines.training.gpu_memory import room_on_gpu
        from pipelines.training.worker import train_worker

    task: WorkerTask = settings["task"]
    with room_to_write(Path(task.curve).parent), room_on_gpu():
        train_worker(task, settings["saved"])
