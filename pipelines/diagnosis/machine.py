"""This machine: disk, memory, GPUs and what computes attention on them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
from huggingface_hub import constants
from transformers.utils import is_flash_attn_2_available

from pipelines.config import Config
from pipelines.diagnosis.cost import Costs
from pipelines.diagnosis.findings import Finding
from pipelines.run.gpu_slots import visible_gpus

_SPARE = 10 * 2**30
"""Bytes of disk for episodes, checkpoints, adapters and answers."""
_GIB = 2**30


def look_at_machine(config: Config, costs: Costs, to_fetch: int) -> Iterator[Finding]:
    """How the machine is for a run that fetches so many bytes."""
    yield from _disk(config, to_fetch)
    memory = psutil.virtual_memory().total
    needed = costs.weight_bytes * (1 if config.train.ray_address else config.train.num_workers)
    told = f"{memory / _GIB:.0f} GiB; loading the largest backbone in every worker takes {needed / _GIB:.0f} GiB"
    yield Finding("memory", "ok" if memory > needed else "missing", told)
    yield from _gpus(config, costs)
    wanted = {entry.attn_implementation for entry in config.backbones.values()}
    if "flash_attention_2" in wanted:
        there = is_flash_attn_2_available()
        told = "FlashAttention 2" if there else "FlashAttention 2 isn't installed: sdpa takes its place"
        yield Finding("attention", "ok" if there else "note", told)


def _disk(config: Config, to_fetch: int) -> Iterator[Finding]:
    for what, folder, needed in (
        ("disk, results", Path(config.results_dir), _SPARE),
        ("disk, Hub's cache", Path(constants.HF_HUB_CACHE), to_fetch),
    ):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        told = f"{free / _GIB:.0f} GiB free, {needed / _GIB:.0f} GiB needed"
        yield Finding(what, "ok" if free > needed else "missing", told)


def _gpus(config: Config, costs: Costs) -> Iterator[Finding]:
    train, there = config.train, len(visible_gpus())
    wanted = train.num_workers * train.gpus_per_worker if train.use_gpu and not train.ray_address else 0
    if config.evaluate.use_gpu:
        wanted = max(wanted, config.evaluate.gpus)
    if not wanted:
        return
    remedy = "" if there >= wanted else "; lower train.num_workers, or set train.ray_address or use_gpu: false"
    yield Finding("GPUs", "ok" if there >= wanted else "missing", f"{there} here, {wanted:g} wanted{remedy}")
    if memory := _gpu_bytes():
        share = min(1.0, train.gpus_per_worker)
        told = f"{memory / _GIB:.0f} GiB; a training takes about {costs.training_bytes / _GIB:.0f} GiB"
        yield Finding("GPU memory", "ok" if memory * share > costs.training_bytes else "note", told)


def _gpu_bytes() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return min(int(size) for size in listed) * 2**20 if listed else None
