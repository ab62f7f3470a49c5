"""Speed and memory of generation, with the adapter and without.

As the public release's tool measures: one ``generate`` call over a random prompt, batch 1, one warm-up, three
runs, whose median counts. Prefill is the time to the first token; decoding is what the further tokens take. Beside it
stands decoding in slots, which is how sessions, the server and the evaluation decode.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StoppingCriteria

from deltamem.backbone.facts import window
from deltamem.decoding.slot_decoder import SlotDecoder
from deltamem.errors import DeltaMemError
from deltamem.model import DeltaMemModel
from deltamem.tools.measuring import peak_bytes, reset_peak, seconds_now


@dataclass(frozen=True)
class Throughput:
    """One measurement.

    Attributes:
        kind: "base" (the frozen backbone alone) or "delta-mem".
        prefill_seconds: from the call to the first token.
        prefill_rate, decode_rate, slots_rate: tokens per second, over the batch.
        peak_bytes: most device memory in use (on a CPU: the process's most memory so far).
    """

    kind: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    prefill_seconds: float
    prefill_rate: float
    decode_rate: float
    slots_rate: float
    peak_bytes: int


def measure(
    model: DeltaMemModel,
    prompt_lengths: list[int],
    new_lengths: list[int],
    batch_size: int = 1,
    runs: int = 3,
) -> Iterator[Throughput]:
    """Measure every combination of lengths, the backbone alone first.

    Raises:
        DeltaMemError: a prompt and its reply are longer than the backbone's window.
    """
    config = model.base_model.config
    longest, limit = max(prompt_lengths) + max(new_lengths), window(config)
    if longest > limit:
        raise DeltaMemError(f"prompt and reply come to {longest} tokens, the backbone's window is {limit}")
    vocabulary = config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(42)
    for prompt in prompt_lengths:
        ids = torch.randint(vocabulary, (batch_size, prompt), generator=generator).to(model.device)
        for kind in ("base", "delta-mem"):
            with model.disable_adapter() if kind == "base" else nullcontext():
                for new in new_lengths:
                    reset_peak(model.device)
                    timed = [_generate(model, ids, new) for _ in range(runs + 1)][1:]  # the first one warms up
                    first, rest = (statistics.median(seconds) for seconds in zip(*timed, strict=True))
                    slots = _slots_seconds(model.base_model if kind == "base" else model, ids, new, runs)
                    yield Throughput(
                        kind,
                        prompt,
                        new,
                        batch_size,
                        prefill_seconds=first,
                        prefill_rate=batch_size * prompt / first,
                        decode_rate=batch_size * (new - 1) / rest,
                        slots_rate=batch_size * (new - 1) / slots,
                        peak_bytes=peak_bytes(model.device),
                    )


class TokenClock(StoppingCriteria):
    """Passed to ``generate``, notes when it began and when each token was chosen; never stops.

    Attributes:
        times: seconds, with the device idle.
    """

    def __init__(self, device: torch.device):
        self.device, self.times = device, [seconds_now(device)]

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.times.append(seconds_now(self.device))
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


@torch.no_grad()
def _generate(model: DeltaMemModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    clock = TokenClock(model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        segment_ids=torch.zeros_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]


def _slots_seconds(model, ids: Tensor, new_tokens: int, runs: int) -> float:
    """Seconds that all tokens but the first take in slots."""
    decoder, seconds = SlotDecoder(model, len(ids), ids.shape[1] + new_tokens), []
    for _ in range(runs + 1):
        decoder.prefill(ids)
        began = seconds_now(ids.device)
        for _ in range(new_tokens - 1):
            decoder.step()
        seconds.append(seconds_now(ids.device) - began)
    return statistics.median(seconds[1:])
