"""``deltamem serve --engine vllm``: what the command needs of this package (entry point ``deltamem.engines``)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from deltamem.backbone.facts import computed_dtype
from deltamem.backbone.facts import window as window_of
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.cli.loading import Named, load_named
from deltamem.errors import DeltaMemError, WindowError
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel
from deltamem.server.metrics import Metrics
from deltamem.server.serving import StartEngine
from deltamem_vllm.engine import engine_arguments
from deltamem_vllm.plugin import register_classes
from deltamem_vllm.scheduler import EngineScheduler

OURS = ("model", "revision", "hf_overrides", "additional_config", "kv_transfer_config", "worker_extension_cls")
"""Arguments of vLLM's that make it an engine with a memory, and aren't the user's to set."""


class EngineRuntime(ChatRuntime):
    """A runtime whose model is the engine's: here are its digests and configuration, and no weights.

    One token of the backbone's window stays free, because the engine is asked for one more than a reply has.
    """

    def __init__(self, model: DeltaMemModel, tokenizer: PreTrainedTokenizerBase, window: int | None):
        limit = window_of(model.base_model.config) - 1
        if window is not None and window > limit:
            raise WindowError(f"a window of {window} tokens: this backbone in vLLM allows 2 to {limit}")
        super().__init__(model, tokenizer, window or limit)
        digests = self.adapter_digest, self.backbone_digest  # remembered, so that sessions are known for ours
        assert all(digests)
        self._empty = {layer: state.cpu() for layer, state in model.new_memory(1).states.items()}
        for parameter in model.base_model.parameters():
            parameter.data = parameter.data.new_empty(0)

    def new_state(self) -> ChatState:
        """A chat without messages and with an empty memory."""
        return ChatState(DeltaMemory(self._empty))


def start(
    named: Named, window: int | None, dtype: str, strength: float, settings: dict[str, Any]
) -> tuple[ChatRuntime, StartEngine]:
    """The runtime, and what starts the scheduler over an engine that is loaded by now.

    Args:
        settings: further arguments of vLLM's engine, by their names in Python.

    Raises:
        DeltaMemError: something that can't be served, or doesn't exist.
    """
    wrong = sorted(set(settings) & {*OURS, "dtype", "max_model_len"})
    if wrong:
        raise DeltaMemError(f"--engine-settings: {', '.join(wrong)} can't be set; it follows from the other options")
    kind = _dtype(named, dtype)
    model, tokenizer = load_named(named, "cpu", str(kind).removeprefix("torch."))
    model.strength = strength
    runtime = EngineRuntime(model, tokenizer, window)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads run here by now
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    register_classes()
    try:
        arguments = AsyncEngineArgs(
            **engine_arguments(named.base, str(named.folder), named.revision),
            skip_tokenizer_init=True,
            dtype=str(kind).removeprefix("torch."),
            max_model_len=runtime.window + 1,
            **{"disable_log_stats": True, **settings},
        )
        with _ending_cleanly():
            engine = AsyncLLM.from_engine_args(arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DeltaMemError(f"vLLM can't start: {error}") from error
    return runtime, partial(_scheduler, engine)


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


def _dtype(named: Named, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    saved = getattr(AutoConfig.from_pretrained(named.base, revision=named.revision), "dtype", None) or torch.float32
    return computed_dtype(saved, "cpu" if current_platform.is_cpu() else "cuda")
