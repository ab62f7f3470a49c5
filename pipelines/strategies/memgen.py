"""MemGen (arXiv 2509.24704): a weaver writes latent tokens into what a frozen reasoner reads.

The weaver is the backbone once more, with a LoRA on its query and value projections. It reads what the reasoner has
read, as embeddings that a linear layer maps into its own, and then a few learnt queries; its last states there, mapped
back by another linear layer, are latent tokens that the reasoner reads next. They stand at the prompt's end, and in the
answer after each of the first tokens whose text ends in a comma, a full stop or a line break.

The method's trigger, a second LoRA that would choose among those places, is always on, as in every evaluation that its
authors publish. On Qwen3-4B there are about 19 million parameters.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem.backbone.no_cache import NoCache
from pipelines.config.strategies import LoraStrategy, MemGenStrategy
from pipelines.strategies.lora import make_lora, trainable

_ENDS = (",", ".", "\n")


class Queries(nn.Module):
    """What the weaver is asked for its latents with: learnt vectors [n, h], of unit length a channel, times a scale."""

    def __init__(self, count: int, hidden: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed can't broadcast a parameter without dimensions

    def forward(self) -> Tensor:
        return self.scale * self.norm(self.vectors)


class Weaver(nn.Module):
    """All that is trained: the LoRA's parameters, the queries, and the ways between reasoner and weaver.

    The LoRA's are named as in the PEFT model, with every dot written as ``/``.
    """

    def __init__(self, model: PeftModel, settings: MemGenStrategy):
        super().__init__()
        hidden = cast(PreTrainedModel, model.get_base_model()).config.get_text_config(decoder=True).hidden_size
        self.prompt = Queries(settings.prompt_latents, hidden)
        self.answer = Queries(settings.answer_latents, hidden)
        self.into, self.back = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        for name, parameter in trainable(model).items():
            self.register_parameter(name.replace(".", "/"), parameter)


class Woven(NamedTuple):
    """What the reasoner reads of a row.

    Attributes:
        embeddings: [T, h], tokens and latents.
        before: [A] int64, the place in front of each answer token; the other places predict nothing, because a latent
            or a token of the prompt comes next.
    """

    embeddings: Tensor
    before: Tensor


class MemGen:
    """A backbone as reasoner and as weaver.

    Attributes:
        model: the backbone with the weaver's LoRA; without it, it is the reasoner.
        ends: [V] bool, tokens after which latents may follow.
    """

    def __init__(self, base: PreTrainedModel, settings: MemGenStrategy, ends: Tensor):
        lora = LoraStrategy(
            kind="lora", context=True, rank=settings.rank, alpha=settings.alpha, target_modules=settings.target_modules
        )
        self.settings = settings
        self.model = make_lora(base, lora, settings.dropout)
        self.weaver = Weaver(self.model, settings)
        self._lora = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.ends = ends
        self.base = cast(PreTrainedModel, self.model.get_base_model())
        self.config, self.generation_config = base.config, base.generation_config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @contextmanager
    def reasoning(self) -> Generator[None]:
        """The backbone without the LoRA."""
        # PEFT's disable_adapter looks through the whole model: too slow for every token and every recomputed layer
        for module in self._lora:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self._lora:
                module.enable_adapters(True)

    def recompute_activations(self) -> None:
        """Recompute activations in the backward pass, the reasoner's without the LoRA as they were made."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # asked in the forward pass; the backward pass comes when the LoRA is on again
            return nullcontext(), self.reasoning() if self._lora[0].disable_adapters else nullcontext()

        options = {"use_reentrant": False, "context_fn": contexts}
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """[T] tokens to [T, h]."""
        return self.base.get_input_embeddings()(torch.as_tensor(ids, device=self.device))

    def weave(self, rows: Sequence[Tensor], queries: Queries) -> Tensor:
        """Latent tokens [B, n, h] after rows of embeddings, [T, h] each of its own length."""
        asked = queries()
        weaver = self.weaver.into.weight.dtype
        read = [torch.cat([self.weaver.into(row.to(weaver)), asked]).to(self.dtype) for row in rows]
        states = _states(self.base, read)
        last = torch.stack([row[len(r) - len(asked) : len(r)] for row, r in zip(states, read, strict=True)])
        return self.weaver.back(last.to(weaver)).to(self.dtype)

    def woven(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Woven]:
        """Prompts with their answers given token by token, and the latents at their places."""
        rows = [self.embed(prompt) for prompt in prompts]
        rows = [torch.cat(pair) for pair in zip(rows, self.weave(rows, self.weaver.prompt), strict=True)]
        cuts = [self.places(answer) for answer in answers]
        before: list[list[int]] = [[] for _ in rows]
        done = [0] * len(rows)

        def extend(row: int, until: int) -> None:
            before[row] += range(len(rows[row]) - 1, len(rows[row]) - 1 + until - done[row])
            rows[row] = torch.cat([rows[row], self.embed(answers[row][done[row] : until])])
            done[row] = until

        for number in range(self.settings.insertions):
            now = [row for row, places in enumerate(cuts) if number < len(places)]
            if not now:
                break
            for row in now:
                extend(row, cuts[row][number])
            latents = self.weave([rows[row] for row in now], self.weaver.answer)
            for row, found in zip(now, latents, strict=True):
                rows[row] = torch.cat([rows[row], found])
        for row, answer in enumerate(answers):
            extend(row, len(answer))
        return [Woven(row, torch.tensor(b, device=self.device)) for row, b in zip(rows, before, strict=True)]

    def places(self, answer: Sequence[int]) -> list[int]:
        """How many of an answer's tokens come before each insertion; after its last token nothing is inserted."""
        ends = self.ends[torch.as_tensor(answer[:-1], dtype=torch.long)].nonzero()[:, 0]
        return (ends[: self.settings.insertions] + 1).tolist()

    def answer_logits(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """Logits before each answer token, [A, V], the rows' one after the other."""
        rows = self.woven(prompts, answers)
        with self.reasoning():
            states = _states(self.base, [row.embeddings for row in rows])
        read = torch.cat([found[row.before] for found, row in zip(states, rows, strict=True)])
        return self.base.get_output_embeddings()(read)


def _states(base: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """Last hidden states [B, longest, h] of rows of embeddings, which are padded on the right: no token sees that."""
    longest = max(map(len, rows))
    padded = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    return base.get_decoder()(inputs_embeds=padded, past_key_values=NoCache(), use_cache=False).last_hidden_state


def ends_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """[V] bool: whether a token's text ends in a comma, a full stop or a line break."""
    ids = range(min(len(tokenizer), vocabulary))
    texts = tokenizer.batch_decode([[token] for token in ids])
    ends = torch.tensor([text.endswith(_ENDS) for text in texts])
    return F.pad(ends, (0, vocabulary - len(ends)))
