"""Batched passes over what a batch of rows has already read: read more, measure an answer, generate one.

Works on a :class:`deltamem.DeltaMemModel` and on any causal language model of transformers; the latter simply
has no memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from deltamem import DeltaMemModel, DeltaMemory
from deltamem.chat.messages import EncodedMessages
from deltamem.decoding.attention import can_share_prefixes
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.prefix import PrefixReader
from deltamem.decoding.slot_decoder import SlotDecoder, round_up
from deltamem.model import backbone_of
from deltamem.tools.measuring import peak_bytes, seconds_now
from pipelines.evaluation.sampling import Draws


@dataclass(frozen=True)
class Rows:
    """What a batch of B rows has read so far.

    Attributes:
        mask: [B, P] int64, 1 for a token in the cache and 0 for padding, which may lie anywhere.
        memory: of B sequences; None for a model without one.
        cache: keys and values of the P tokens.
        prefix: keys and values of one row, which all rows have read before; None: nothing.
    """

    mask: Tensor
    memory: DeltaMemory | None
    cache: Cache
    prefix: KeyValues | None = None

    @property
    def cache_bytes(self) -> int:
        return KeyValues.from_cache(self.cache).nbytes

    def select(self, rows: Sequence[int]) -> Rows:
        """Some rows, in the order given, a row as often as it is named; these stay as they are."""
        index = torch.tensor(rows, device=self.mask.device)
        cache = _fork(self.cache)
        cache.batch_select_indices(index)
        return Rows(self.mask[index], self.memory.select(index) if self.memory else None, cache, self.prefix)

    def beginning(self, row: int) -> Rows:
        """One row, as the beginning of what is selected from it: selecting does not copy its keys and values."""
        counts = self.mask[row].bool()
        layers = KeyValues.from_cache(self.cache).layers
        prefix = KeyValues(tuple((k[row : row + 1, :, counts], v[row : row + 1, :, counts]) for k, v in layers))
        return Rows(self.mask[row : row + 1, :0], self.memory and self.memory.select([row]), DynamicCache(), prefix)


class Reader:
    """Runs a model on batches of token lists.

    Args:
        end_ids: tokens that end an answer.
        pad_id: fills up shorter rows.
    """

    def __init__(self, model: DeltaMemModel | PreTrainedModel, end_ids: Sequence[int], pad_id: int):
        self.model, self.end_ids, self.pad_id = model, list(end_ids), pad_id
        self.has_memory = isinstance(model, DeltaMemModel)
        base = backbone_of(model)
        self.config, self.device = base.config, model.device
        self.shares_beginnings = can_share_prefixes(base)
        """Whether this model can read on from :meth:`Rows.beginning`."""
        self._decoder: SlotDecoder | None = None
        self.tokens = 0
        """Tokens read, written and generated so far, padding not counted."""

    @property
    def _with_memory(self) -> DeltaMemModel:
        return cast(DeltaMemModel, self.model)

    @cached_property
    def _after_prefix(self) -> PrefixReader:
        return PrefixReader(self.model)

    def start(self, batch_size: int, memory: DeltaMemory | None = None) -> Rows:
        """Rows that have read nothing; their memory is ``memory``, or empty."""
        if self.has_memory and memory is None:
            memory = self._with_memory.new_memory(batch_size)
        mask = torch.zeros(batch_size, 0, dtype=torch.int64, device=self.device)
        return Rows(mask, memory, DynamicCache(config=self.config))

    @torch.inference_mode()
    def write(self, batch: Sequence[EncodedMessages], memory: DeltaMemory | None = None) -> DeltaMemory:
        """Write tokens into a memory that nothing else is read from."""
        ids, mask = self._pad([row.input_ids for row in batch], left=False)
        segments = self._pad([row.segment_ids for row in batch], left=False, fill=-1)[0]
        self.tokens += int(mask.sum())
        return self._with_memory.write(ids, attention_mask=mask, memory=memory, segment_ids=segments)

    @torch.inference_mode()
    def read(self, rows: Rows, batch: Sequence[EncodedMessages], write: bool) -> Rows:
        """Read on; with ``write`` the memory is written as the tokens pass."""
        if not any(row.input_ids for row in batch):
            return rows
        ids, mask = self._pad([row.input_ids for row in batch], left=True)
        segments = self._pad([row.segment_ids for row in batch], left=True, fill=-1)[0]
        return self._forward(rows, ids, mask, segments, write, logits_to_keep=1)[1]

    @torch.inference_mode()
    def answer_nll(self, rows: Rows, last: Sequence[int], answers: Sequence[Sequence[int]], write: bool) -> list[float]:
        """Mean negative log-likelihood per token (nats) of each row's answer, given token by token.

        The answer is one pass and, for the sequence-state write, one segment.

        Args:
            last: the last token of each prompt, not read yet.
            answers: the answers' tokens, with the end of turn.
        """
        logits, targets = self.answer_logits(rows, last, answers, write)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return (losses.sum(1) / (targets >= 0).sum(1)).tolist()

    @torch.inference_mode()
    def answer_logits(
        self, rows: Rows, last: Sequence[int], answers: Sequence[Sequence[int]], write: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, vocabulary] float32 before each answer token; the tokens [B, T], -100 where padded.

        Arguments as in :meth:`answer_nll`.
        """
        ids, _ = self._pad([[first, *answer[:-1]] for first, answer in zip(last, answers, strict=True)], left=False)
        targets, mask = self._pad(answers, left=False, fill=-100)
        return self._forward(rows, ids, mask, torch.zeros_like(ids), write)[0].float(), targets

    @torch.inference_mode()
    def generate(
        self, rows: Rows, last: Sequence[int], limits: Sequence[int], write: bool, draws: Draws | None = None
    ) -> list[list[int]]:
        """Answers, greedy or drawn, at most ``limits`` tokens each, without the end of turn."""
        decoder = self._decoder_for(len(last), rows.mask.shape[1] + max(limits), rows.prefix)
        first = torch.tensor(list(last), device=self.device)
        # the last token of a prompt belongs to no message: ssw doesn't write it
        writes = write and not (self.has_memory and self.model.config.strategy == "ssw")
        decoder.fill(range(len(last)), KeyValues.from_cache(rows.cache), first, rows.memory, rows.mask, writes)
        answers = decoder.generate(limits, self.end_ids, write, draws)
        self.tokens += sum(map(len, answers)) + len(answers)
        return answers

    def _decoder_for(self, rows: int, length: int, prefix: KeyValues | None) -> SlotDecoder:
        """A decoder with at least so many slots and tokens, kept from call to call where a captured step saves time."""
        rows, length = round_up(rows, self.device), round_up(length, self.device)
        kept = self._decoder
        if kept is None or (kept.slots, kept.capacity) != (rows, length) or kept.prefix is not prefix:
            self._decoder = kept = None  # its buffers go before new ones are made
            self._decoder = kept = SlotDecoder(self.model, rows, length, prefix)
        else:
            kept.free(range(rows))
        return kept

    @contextmanager
    def steered(self, strength: float) -> Generator[None]:
        """Inside, the memory steers so strongly, 1 as trained; a model without one stays as it is."""
        if not self.has_memory:
            yield
            return
        model = self._with_memory
        before, model.strength = model.strength, strength
        try:
            yield
        finally:
            model.strength = before

    @contextmanager
    def cost(self, part: str) -> Generator[dict[str, Any]]:
        """Fills a dict with what the work inside takes: seconds, tokens, and the peak of memory in bytes."""
        cost: dict[str, Any] = {"part": part}
        begin, tokens = time.perf_counter(), self.tokens
        yield cost
        cost |= {
            "seconds": seconds_now(self.device) - begin,
            "tokens": self.tokens - tokens,
            "peak_bytes": peak_bytes(self.device),
        }

    def _forward(self, rows: Rows, ids: Tensor, mask: Tensor, segments: Tensor, write: bool, **options: Any):
        """One pass over new tokens [B, T]; logits, and the rows after it."""
        self.tokens += int(mask.sum())
        mask, cache = torch.cat([rows.mask, mask], dim=1), _fork(rows.cache)
        if rows.prefix:
            logits, memory = self._after_prefix.forward(
                rows.prefix, ids, mask, cache, rows.memory, write, segments, **options
            )
            return logits, replace(rows, mask=mask, memory=memory, cache=cache)
        if self.has_memory:
            options |= {"memory": rows.memory, "write": write, "segment_ids": segments}
        out = self.model(
            ids,
            attention_mask=mask,
            # given here, because a model counts padding when it numbers tokens by itself
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        memory = out.memory if self.has_memory else None
        return out.logits, replace(rows, mask=mask, memory=memory, cache=out.past_key_values)

    def _pad(self, rows: Sequence[Sequence[int]], left: bool, fill: int | None = None) -> tuple[Tensor, Tensor]:
        """[B, T] int64 and its mask."""
        length = max(map(len, rows))
        fill = self.pad_id if fill is None else fill
        padded, mask = [], []
        for row in rows:
            gap = length - len(row)
            padded.append([*[fill] * gap, *row] if left else [*row, *[fill] * gap])
            mask.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
        return torch.tensor(padded, device=self.device), torch.tensor(mask, device=self.device)


def reader_of(model: DeltaMemModel | PreTrainedModel, end_ids: Sequence[int], pad_id: int) -> Reader:
    """What runs a model: the reader that it brings, where it is more than a language model with a cache."""
    make = getattr(model, "make_reader", Reader)
    return make(end_ids, pad_id) if make is not Reader else Reader(model, end_ids, pad_id)


def _fork(cache: Cache) -> Cache:
    """A cache that grows on its own; it shares the tensors, which growing replaces and doesn't change."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
