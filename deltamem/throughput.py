"""Speed and memory of generation, with the adapter and without.

As the public release's tool measures: one ``generate`` call over a random prompt, batch 1, one warm-up, three
runs, whose median counts. Prefill is the time to the first token; decoding is what the further tokens take.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from deltamem.model import DeltaMemModel


@dataclass(frozen=True)
class Throughput:
    """One measurement.

    Attributes:
        kind: "base" (the frozen backbone alone) or "delta-mem".
        prefill_seconds: from the call to the first token.
        prefill_rate, decode_rate: tokens per second, over the batch.
        peak_bytes: most device memory in use (on a CPU: the process's most memory so far).
    """

    kind: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    prefill_seconds: float
    prefill_rate: float
    decode_rate: float
    peak_bytes: int


def measure(
    model: DeltaMemModel,
    prompt_lengths: list[int],
    new_lengths: list[int],
    batch_size: int = 1,
    runs: int = 3,
) -> Iterator[Throughput]:
    """Measure every combination of lengths, the backbone alone first."""
    vocabulary = model.base_model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(42)
    for prompt in prompt_lengths:
        ids = torch.randint(vocabulary, (batch_size, prompt), generator=generator).to(model.device)
        for kind in ("base", "delta-mem"):
            with model.disable_adapter() if kind == "base" else nullcontext():
                first = _median_seconds(model, ids, 1, runs)
                for new in new_lengths:
                    _reset_peak(model.device)
                    whole = _median_seconds(model, ids, new, runs)
                    decode = batch_size * (new - 1) / (whole - first) if whole > first else float("nan")
                    rate = batch_size * prompt / first
                    yield Throughput(kind, prompt, new, batch_size, first, rate, decode, _peak_bytes(model.device))


def _median_seconds(model: DeltaMemModel, ids: torch.Tensor, new_tokens: int, runs: int) -> float:
    seconds = []
    for _ in range(runs + 1):
        _synchronise(model.device)
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                segment_ids=torch.zeros_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        _synchronise(model.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one warms up


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
