"""Answers that are drawn, where a benchmark's protocol draws them; everywhere else they are greedy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How a token is drawn: of the ``top_k`` likeliest those that make up ``top_p``, at a temperature."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


RELEASE = Sampling(temperature=0.4, top_p=0.9, top_k=10, seed=42)
"""The public release's. Its seed goes with a question's place in a batch; here it goes with the question."""


class Draws:
    """Draws the tokens of some answers side by side.

    What an answer draws depends on the seed and its question alone: not on the batch, on an interruption, or on the
    condition, so that conditions are compared with the same luck.

    Args:
        questions: of the answers, one a row.
    """

    def __init__(self, sampling: Sampling, questions: Sequence[str]):
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(_seed(sampling.seed, question)) for question in questions]

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of every row, [B] int64, from logits [B, V]."""
        luck = torch.cat([torch.rand(1, generator=generator) for generator in self._generators])
        scores = logits.float() / self.sampling.temperature
        likeliest = scores.topk(min(self.sampling.top_k, scores.shape[-1]), dim=-1)
        shares = likeliest.values.softmax(-1)
        before = shares.cumsum(-1) - shares
        ends = shares.masked_fill(before >= self.sampling.top_p, 0).cumsum(-1)
        place = (ends <= luck.to(ends.device)[:, None] * ends[:, -1:]).sum(-1, keepdim=True)
        return likeliest.indices.gather(-1, place.clamp_max(ends.shape[-1] - 1))[:, 0]


def _seed(seed: int, question: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{question}".encode()).digest()[:8]) >> 1
