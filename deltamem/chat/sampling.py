"""Which token comes next: the likeliest or a drawn one, with transformers' own processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from deltamem.chat.reply import TurnOptions
from deltamem.errors import DeltaMemError


class OccurrencePenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which transformers lacks; over the reply alone, as vLLM's."""

    def __init__(self, presence: float, frequency: float):
        self.presence, self.frequency = presence, frequency

    def __call__(self, reply: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] after a reply's tokens [1, T]."""
        counts = torch.bincount(reply[0], minlength=scores.shape[-1])
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Sampler:
    """Chooses one turn's tokens.

    Raises:
        DeltaMemError: ``options.logit_bias`` names a token that the vocabulary doesn't have.
    """

    def __init__(self, options: TurnOptions, vocabulary: int, device: torch.device):
        wrong = [token for token in options.logit_bias if not 0 <= token < vocabulary]
        if wrong:
            raise DeltaMemError(f"logit_bias: there is no token {wrong[0]}; the vocabulary ends at {vocabulary - 1}")
        self._over_all, self._over_reply, self._warpers = (LogitsProcessorList() for _ in range(3))
        if options.repetition_penalty != 1:
            self._over_all.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        if options.logit_bias:
            bias: list[list[list[int] | float]] = [[[token], float(b)] for token, b in options.logit_bias.items()]
            self._over_all.append(SequenceBiasLogitsProcessor(bias))
        if options.presence_penalty or options.frequency_penalty:
            self._over_reply.append(OccurrencePenalty(options.presence_penalty, options.frequency_penalty))
        self._generator: torch.Generator | None = None
        if options.temperature > 0:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(options.seed) if options.seed is not None else self._generator.seed()
            self._warpers.extend(_warpers(options))

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether it does nothing but that."""
        return not (self._over_all or self._over_reply or self._generator)

    def choose(self, scores: Tensor, tokens: Sequence[int], prompt_length: int) -> int:
        """The next token.

        Args:
            scores: the model's logits, [1, V].
            tokens: prompt and reply so far.
        """
        seen = cast(torch.LongTensor, torch.tensor([tokens], device=scores.device))
        scores = self._over_all(seen, scores.float())
        scores = self._over_reply(cast(torch.LongTensor, seen[:, prompt_length:]), scores)
        if self._generator is None:
            return int(scores.argmax(-1))
        scores = self._warpers(seen, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def _warpers(options: TurnOptions) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0:
        warpers.append(MinPLogitsWarper(options.min_p))
    if options.typical_p < 1:
        warpers.append(TypicalLogitsWarper(options.typical_p))
    return warpers
