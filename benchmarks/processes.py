"""What benchmarks with processes of their own need."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist


def free_port() -> int:
    """A port of this machine's own address that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def join_process_group(device: torch.device, port: int, rank: int = 0, count: int = 1) -> None:
    """Makes this process one of a group on this machine, which all of them have to join."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
