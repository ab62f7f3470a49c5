"""Question-answering tasks that measure what a model remembers: one module each, with loader, prompts and scorer.

How fast the code is, is measured elsewhere: in the package ``benchmarks`` at the top of the project.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from pipelines.benchmarks.base import Benchmark, Context, Question
from pipelines.config.benchmarks import OF_EPISODES, BenchmarkSettings

__all__ = ["Benchmark", "Context", "Question", "get_benchmark"]

# Imported on use: a module brings the libraries that its files and scores need.
_CLASSES = {
    "qasper": "Qasper",
    "held_out": "HeldOut",
    "locomo": "Locomo",
    "hotpotqa": "Hotpotqa",
    "memory_agent_bench": "MemoryAgentBench",
    "test_time_learning": "TestTimeLearning",
    "facts": "Facts",
    "chat_recall": "ChatRecall",
    "chat_replies": "ChatReplies",
}


def get_benchmark(name: str, settings: BenchmarkSettings, episodes: Path | None = None) -> Benchmark:
    """The benchmark of a configuration's entry.

    Args:
        name: the entry's name.
        settings: the entry. Kind ``lm_eval`` is not a benchmark of contexts and questions and is run by
            :func:`pipelines.harness.tasks.run_lm_eval`.
        episodes: folder of the evaluation episodes, which the kinds ``qasper`` and ``held_out`` read.
    """
    made = getattr(importlib.import_module(f"pipelines.benchmarks.{settings.kind}"), _CLASSES[settings.kind])
    return made(name, settings, episodes) if settings.kind in OF_EPISODES else made(name, settings)
