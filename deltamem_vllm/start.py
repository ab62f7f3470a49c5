"""``deltamem serve --engine vllm``: what the command needs of this package (entry point ``deltamem.engines``)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from deltamem.backbone.facts import computed_dtype
from deltamem.cli.loading import Named, load_backbone
from deltamem.errors import DeltaMemError
from deltamem.model import DeltaMemModel
from deltamem.server.metrics import Metrics
from deltamem.server.serving import StartEngine
from deltamem_vllm.engine import engine_arguments
from deltamem_vllm.plugin import register_classes
from deltamem_vllm.runtime import EngineRuntime, drop_weights
from deltamem_vllm.scheduler import EngineScheduler

OURS = ("model", "revision", "hf_overrides", "additional_config", "kv_transfer_config", "worker_extension_cls")
"""Arguments of vLLM's that make it an engine with a memory, and aren't the user's to set."""


def start(
    served: Mapping[str, Named], window: int | None, dtype: str, strength: float, settings: dict[str, Any]
) -> tuple[dict[str, EngineRuntime], StartEngine]:
    """The runtimes by name, and what starts the scheduler over an engine that is loaded by now.

    Args:
        served: adapters of one backbone, by the names that clients call them.
        settings: further arguments of vLLM's engine, by their names in Python.

    Raises:
        DeltaMemError: something that can't be served, or doesn't exist.
    """
    wrong = sorted(set(settings) & {*OURS, "dtype", "max_model_len"})
    if wrong:
        raise DeltaMemError(f"--engine-settings: {', '.join(wrong)} can't be set; it follows from the other options")
    _, base, revision = next(iter(served.values()))
    kind = _dtype(base, revision, dtype)
    runtimes = _runtimes(served, window, kind, strength)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads run here by now
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    register_classes()
    try:
        arguments = AsyncEngineArgs(
            **engine_arguments(base, {name: str(named.folder) for name, named in served.items()}, revision),
            skip_tokenizer_init=True,
            dtype=kind,
            max_model_len=max(runtime.window for runtime in runtimes.values()) + 1,
            **{"disable_log_stats": True, **settings},
        )
        with _ending_cleanly():
            engine = AsyncLLM.from_engine_args(arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DeltaMemError(f"vLLM can't start: {error}") from error
    return runtimes, partial(_scheduler, engine)


def _runtimes(served: Mapping[str, Named], window: int | None, dtype: str, strength: float) -> dict[str, EngineRuntime]:
    _, base, revision = next(iter(served.values()))
    backbone, tokenizer = load_backbone(base, revision, "cpu", dtype)
    runtimes: dict[str, EngineRuntime] = {}
    known: dict[str, str] = {}
    for name, named in served.items():
        model = DeltaMemModel.from_pretrained(backbone, named.folder)
        model.strength = strength
        runtime = runtimes[name] = EngineRuntime(name, model, tokenizer, window)
        if (other := known.setdefault(runtime.adapter_digest, name)) != name:
            raise DeltaMemError(f"{other} and {name} are the same adapter: whose would a session be? Leave one out")
    drop_weights(backbone)
    return runtimes


@contextmanager
def _ending_cleanly() -> Generator[None]:
    """Inside, SIGTERM is an exception, on which vLLM ends the processes that it has begun; else they would stay."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _scheduler(engine: AsyncLLM, metrics: Metrics, together: int, waiting: int) -> EngineScheduler:
    return EngineScheduler(engine, metrics, together + waiting)


def _dtype(base: str, revision: str | None, dtype: str) -> str:
    """Its name, as vLLM and our own loading take it."""
    if dtype != "auto":
        return dtype
    saved = getattr(AutoConfig.from_pretrained(base, revision=revision), "dtype", None) or torch.float32
    return str(computed_dtype(saved, "cpu" if current_platform.is_cpu() else "cuda")).removeprefix("torch.")
