"""Evaluations of MemGen: rows keep the tokens that they have read, because the weaver reads all of them anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from deltamem import DeltaMemory
from deltamem.chat.messages import EncodedMessages
from pipelines.evaluation.passes import Reader, Rows
from pipelines.evaluation.sampling import Draws
from pipelines.strategies.memgen import MemGen


class EvaluatedMemGen(MemGen):
    """MemGen with the reader that evaluations run it with."""

    def make_reader(self, end_ids: Sequence[int], pad_id: int) -> Reader:
        return MemGenReader(self, end_ids, pad_id)


@dataclass(frozen=True)
class ReadTokens(Rows):
    """What each row has read, as tokens; keys and values are made when an answer is asked for.

    Attributes:
        tokens: of each of B rows.
        token_bytes: of the keys and values that a token will have.
    """

    tokens: tuple[tuple[int, ...], ...] = ()
    token_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.token_bytes * sum(map(len, self.tokens))

    def select(self, rows: Sequence[int]) -> ReadTokens:
        return replace(self, tokens=tuple(self.tokens[row] for row in rows))


class MemGenReader(Reader):
    """Runs MemGen on batches of token lists; see :class:`Reader` for the arguments and what they return."""

    def __init__(self, memgen: MemGen, end_ids: Sequence[int], pad_id: int):
        super().__init__(memgen.base, end_ids, pad_id)
        self.memgen = memgen
        self.shares_beginnings = False
        text = memgen.config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self._token_bytes = 2 * text.num_hidden_layers * heads * width * memgen.dtype.itemsize

    def start(self, batch_size: int, memory: DeltaMemory | None = None) -> ReadTokens:
        nothing = torch.zeros(batch_size, 0, dtype=torch.int64, device=self.device)
        return ReadTokens(nothing, None, DynamicCache(), None, ((),) * batch_size, self._token_bytes)

    def read(self, rows: Rows, batch: Sequence[EncodedMessages], write: bool) -> Rows:
        assert isinstance(rows, ReadTokens)
        self.tokens += sum(len(new.input_ids) for new in batch)
        tokens = tuple((*old, *new.input_ids) for old, new in zip(rows.tokens, batch, strict=True))
        return replace(rows, tokens=tokens)

    @torch.inference_mode()
    def answer_logits(
        self, rows: Rows, last: Sequence[int], answers: Sequence[Sequence[int]], write: bool
    ) -> tuple[Tensor, Tensor]:
        self.tokens += sum(map(len, answers))
        logits = self.memgen.answer_logits(self._prompts(rows, last), answers).float()
        targets, mask = self._pad(answers, left=False, fill=-100)
        padded = logits.new_zeros(*targets.shape, logits.shape[-1])
        padded[mask.bool()] = logits
        return padded, targets

    @torch.inference_mode()
    def generate(
        self, rows: Rows, last: Sequence[int], limits: Sequence[int], write: bool, draws: Draws | None = None
    ) -> list[list[int]]:
        answers = _Answers(self.memgen, self._prompts(rows, last))
        while any(not answer.ended for answer in answers.rows):
            chosen = draws(answers.logits) if draws else answers.logits.argmax(-1)
            answers.go_on(chosen.tolist(), limits, self.end_ids)
        self.tokens += sum(len(answer.tokens) + 1 for answer in answers.rows)
        return [answer.tokens for answer in answers.rows]

    @staticmethod
    def _prompts(rows: Rows, last: Sequence[int]) -> list[list[int]]:
        assert isinstance(rows, ReadTokens)
        return [[*tokens, token] for tokens, token in zip(rows.tokens, last, strict=True)]


@dataclass
class _Answer:
    """One answer in the making.

    Attributes:
        read: embeddings [T, h] that the reasoner has read, with those that still wait.
        waiting: those that it has yet to read, one a step.
        inserted: how often latents were.
    """

    read: Tensor
    waiting: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    inserted: int = 0
    ended: bool = False


class _Answers:
    """Answers side by side; at each step every row reads one place, a token or a latent.

    Attributes:
        logits: [B, V] after the places read last.
    """

    def __init__(self, memgen: MemGen, prompts: Sequence[Sequence[int]]):
        self.memgen, self.cache = memgen, DynamicCache()
        rows = [memgen.embed(prompt) for prompt in prompts]
        woven = [torch.cat(pair) for pair in zip(rows, memgen.weave(rows, memgen.weaver.prompt), strict=True)]
        self.rows = [_Answer(row) for row in woven]
        longest = max(map(len, woven))
        self.mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in woven], device=memgen.device)
        self.logits = self._step(torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in woven]))

    def go_on(self, chosen: Sequence[int], limits: Sequence[int], end_ids: Sequence[int]) -> None:
        """Takes the chosen tokens where a row has nothing else to read, and reads one place of every row."""
        memgen, inserting = self.memgen, []
        for row, token, limit in zip(self.rows, chosen, limits, strict=True):
            if row.ended or row.waiting:
                continue
            row.ended = token in end_ids
            if row.ended:
                continue
            row.tokens.append(token)
            row.ended = len(row.tokens) == limit
            row.waiting.append(memgen.embed([token])[0])
            row.read = torch.cat([row.read, row.waiting[-1][None]])
            if memgen.ends[token] and row.inserted < memgen.settings.insertions and not row.ended:
                row.inserted += 1
                inserting.append(row)
        if inserting:
            latents = memgen.weave([row.read for row in inserting], memgen.weaver.answer)
            for row, found in zip(inserting, latents, strict=True):
                row.waiting += list(found)
                row.read = torch.cat([row.read, found])
        if any(not row.ended for row in self.rows):
            nothing = torch.zeros_like(self.rows[0].read[0])
            places = [row.waiting.pop(0) if row.waiting else nothing for row in self.rows]
            self.mask = F.pad(self.mask, (0, 1), value=1)
            self.logits = self._step(torch.stack(places)[:, None])

    def _step(self, embeddings: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -embeddings.shape[1] :]
        with self.memgen.reasoning():
            out = self.memgen.base(
                inputs_embeds=embeddings, attention_mask=self.mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        return out.logits[:, -1]
