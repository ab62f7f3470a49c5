"""Which rows of a batch have ended, each for itself, while ``generate`` goes on with the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from deltamem.backbone.facts import as_ids
from deltamem.backbone.generation_options import GenerationOptions

_OF_TRANSFORMERS = (MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria, EosTokenCriteria)
"""Criteria that ``generate`` makes itself, or takes in place of its own where the caller passes one of their type."""


class RowEnds(StoppingCriteria):
    """Takes the part of the caller's criteria and notes which rows they end, together with end tokens and stop strings.

    transformers feeds a row that has ended with padding until the last one ends. Which token pads doesn't tell: it may
    be an ordinary one.

    Args:
        criteria: those that end single rows.
        beams: rows are beams, which are dropped and reordered: finished ones are known by their tokens.
    """

    def __init__(self, criteria: Sequence[StoppingCriteria], beams: bool):
        self._criteria, self._beams = StoppingCriteriaList(criteria), beams
        self._ended: Tensor | None = None
        self._finished: set[tuple[int, ...]] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        ended = self._criteria(input_ids, scores, **kwargs)
        if self._beams:
            self._finished |= {tuple(row) for row in input_ids[ended].tolist()}
        else:
            self._ended = ended if self._ended is None else self._ended | ended
        return ended

    def alive(self, rows: int, device: torch.device) -> Tensor:
        """[rows] bool: those that haven't ended. Beams that have are no longer fed."""
        if self._ended is None:
            return torch.ones(rows, dtype=torch.bool, device=device)
        return ~self._ended.to(device)

    def alive_along(self, sequences: Tensor, prompt: int) -> Tensor:
        """Of finished beams: [S, T - prompt] bool, the generated tokens before the one that ended the sequence."""
        alive = torch.ones_like(sequences[:, prompt:], dtype=torch.bool)
        for row, tokens in enumerate(sequences.tolist()):
            end = next((t for t in range(prompt + 1, len(tokens) + 1) if tuple(tokens[:t]) in self._finished), None)
            if end is not None:
                alive[row, end - 1 - prompt :] = False
        return alive


def watch_ends(options: GenerationOptions) -> RowEnds:
    """Put a :class:`RowEnds` among the arguments of a ``generate`` call, in place of the caller's own criteria."""
    given = list(options.arguments.get("stopping_criteria") or [])
    ends = [criterion for criterion in given if not isinstance(criterion, _OF_TRANSFORMERS)]
    # these are evaluated twice, by transformers too, which changes nothing: they keep no state
    known = [criterion for criterion in given if isinstance(criterion, StopStringCriteria | EosTokenCriteria)]
    if not any(isinstance(criterion, EosTokenCriteria) for criterion in known):
        ids = as_ids(options.get("eos_token_id"))
        known += [EosTokenCriteria(torch.tensor(ids, device=options.device))] if ids else []
    strings, tokenizer = options.get("stop_strings"), options.arguments.get("tokenizer")
    if strings and tokenizer is not None and not any(isinstance(criterion, StopStringCriteria) for criterion in known):
        known.append(StopStringCriteria(tokenizer, strings))
    rows = RowEnds([*ends, *known], beams=(options.get("num_beams") or 1) > 1)
    options.arguments["stopping_criteria"] = StoppingCriteriaList(
        [*(criterion for criterion in given if isinstance(criterion, _OF_TRANSFORMERS)), rows]
    )
    return rows
