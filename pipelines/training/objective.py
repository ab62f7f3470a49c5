"""The loss of an episode: write the context, answer the question from the memory alone (paper, Training recipe)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltamem import DeltaMemModel, DeltaMemory
from pipelines.training.batches import EpisodeBatch, Reads, Texts
from pipelines.training.losses import answer_logits, answer_nll, divergence, token_nll, told_apart


class EpisodeLoss(NamedTuple):
    """Scalars of one micro-batch, of which ``loss`` is minimised.

    Attributes:
        write_gate, state_norm: 0 where no text has a token.
        contrast, repeat_nll, kl: parts of the loss, before their weights; None where they are none.
        token_nll: of each answer token, [A] nats.
        states: [layers, C, N, r, r] float32, those that the texts leave; None where no text's memory begins elsewhere.
    """

    loss: Tensor
    answer_nll: Tensor
    write_gate: Tensor
    state_norm: Tensor
    contrast: Tensor | None
    repeat_nll: Tensor | None
    kl: Tensor | None
    token_nll: Tensor
    states: Tensor | None


class MemoryObjective(nn.Module):
    """What DeepSpeed trains: only the adapter is in its module tree, so only the adapter is in its checkpoints.

    Args:
        write_penalty, write_target: weight w and target g of the penalty w · mean_layers((mean β - g)²), taken from
            the gates of the write pass.
        write_questions: write question and answer as they are read, which ssw does only once they are complete: there
            it changes nothing.
        repeat_weight: of the texts to repeat.
        keep_weight: of the divergence from the frozen model on replies of its own.
        lanes: memories that go on from step to step (:mod:`pipelines.training.lanes`).
    """

    def __init__(
        self,
        model: DeltaMemModel,
        write_penalty: float,
        write_target: float,
        write_questions: bool = False,
        repeat_weight: float = 0.0,
        keep_weight: float = 0.0,
        lanes: int = 0,
    ):
        super().__init__()
        self.adapter = model.memory_layers
        self.model = (model,)  # a tuple hides the frozen backbone from the module tree
        self.write_penalty, self.write_target = write_penalty, write_target
        self.write_questions = write_questions and model.config.strategy != "ssw"
        self.repeat_weight, self.keep_weight = repeat_weight, keep_weight
        nowhere = 1  # a place for what is left in no lane
        state = model.config.states, model.config.rank, model.config.rank
        self.left = torch.zeros(len(model.memory_layers), lanes + nowhere, *state, device=model.device)
        self.graphs: Callable[[EpisodeBatch], EpisodeLoss] | None = None
        """What computes :meth:`losses` and their gradients where they are learnt from; None: PyTorch, as it comes."""

    def forward(self, batch: EpisodeBatch) -> EpisodeLoss:
        lanes, learns = batch.lanes, torch.is_grad_enabled()
        batch = self.begun(batch)  # outside of what graphs capture: a capture passes over its batch several times
        result = self.graphs(batch) if self.graphs is not None and learns else self.losses(batch)
        if lanes is not None and learns and result.states is not None:
            self.left[:, lanes[:, 1]] = result.states[:, : len(lanes)]
        return result

    def begun(self, batch: EpisodeBatch) -> EpisodeBatch:
        """The batch with the memories that its lanes hold now instead of their numbers."""
        if batch.lanes is None:
            return batch
        begins = batch.lanes[:, 0]
        return replace(batch, lanes=None, initial=self.left[:, begins] * (begins >= 0)[:, None, None, None])

    def losses(self, batch: EpisodeBatch) -> EpisodeLoss:
        """Of a batch, on the device where the model is."""
        fresh, memory, gate = self._write(batch)
        logits = self._logits(batch, memory.select(batch.owner))
        tokens = token_nll(logits, batch)
        nll = answer_nll(tokens, batch)
        penalty = (gate - self.write_target).square().mean()
        if batch.context_mask is not None:
            penalty = penalty * batch.context_mask.any()  # what writes nothing has no gates
        loss = nll + self.write_penalty * penalty
        contrast = repeat = kl = None
        if batch.others is not None and batch.contrast is not None:
            wrong = self._nll(batch, memory.select(batch.others))
            contrast = told_apart(tokens, wrong, batch, batch.others != batch.owner)
            loss = loss + batch.contrast * contrast
        if batch.repeat is not None:
            repeat = self._repeat_nll(batch.repeat, fresh)
            loss = loss + self.repeat_weight * repeat
        if self.keep_weight:
            kl = self._kept_kl(batch, logits)
            loss = loss + self.keep_weight * kl
        norms = _mean_norm(memory.detach(), batch.context_mask)
        parts = (None if part is None else part.detach() for part in (contrast, repeat, kl))
        states = None
        if batch.initial is not None:
            states = torch.stack([memory.states[i] for i in sorted(memory.states)]).detach()
        return EpisodeLoss(loss, nll.detach(), gate.detach().mean(), norms, *parts, tokens.detach(), states)

    def _write(self, batch: EpisodeBatch) -> tuple[DeltaMemory, DeltaMemory, Tensor]:
        """The memories right after their own texts, those after all texts, and the mean write gate of each layer."""
        (model,) = self.model
        begun = None
        if batch.initial is not None:
            begun = DeltaMemory(dict(zip(sorted(map(int, model.memory_layers)), batch.initial, strict=True)))
        fresh, gate = model.write_with_gates(**_written(batch), memory=begun)
        memory, gates = fresh, [gate]
        for texts in batch.after:
            memory, gate = model.write_with_gates(**_written(texts), memory=memory)
            gates.append(gate)
        return fresh, memory, torch.stack(gates).mean(0)

    @torch.no_grad()
    def sum_of_norms(self, batches: Iterable[EpisodeBatch]) -> tuple[Tensor, Tensor]:
        """Of the states after all texts of an episode, and of how many texts: those that have a token.

        Returns:
            [layers, N] float32, a scalar float32.
        """
        (model,) = self.model
        total = torch.zeros(len(model.memory_layers), model.config.states, device=model.device)
        count = total.new_zeros(())
        for batch in batches:
            norms = torch.stack(list(self._write(batch)[1].norms().values()))
            mask = batch.context_mask
            texts = norms.new_ones(norms.shape[1]) if mask is None else mask.any(1).to(norms.dtype)
            total += torch.einsum("lbn,b->ln", norms, texts)
            count += texts.sum()
        return total, count

    def _repeat_nll(self, repeat: Reads, memory: DeltaMemory) -> Tensor:
        if not len(repeat.owner):  # the step's are in other micro-batches
            return memory.states[min(memory.states)].new_zeros(())
        return answer_nll(self._nll(repeat, memory.select(repeat.owner)), repeat)

    def _kept_kl(self, batch: EpisodeBatch, logits: Tensor) -> Tensor:
        """Mean over all questions of KL(frozen ‖ adapted) per token of the replies to keep, a scalar in nats.

        The frozen model reads what the adapted one does, and has no memory.
        """
        if batch.kept is None:
            return logits.new_zeros((), dtype=torch.float32)
        (model,) = self.model
        with torch.no_grad():
            options = {"write": False, "right_padded": True, "strength": 0.0}
            frozen = answer_logits(model, model.base_model, batch, **options)
        return (divergence(frozen, logits) * batch.kept).sum()

    @torch.no_grad()
    def memory_effect(self, batches: Sequence[tuple[EpisodeBatch, float]]) -> Tensor:
        """Answer NLL with another paper's memory, less that with the right one: nats per token, a scalar.

        Of the questions of texts that have a token: the others have no memory that could be another's.

        Args:
            batches: the micro-batches and their weights; NaN where all their contexts are of one paper.
        """
        if _of_one_paper(_papers([batch for batch, _ in batches])):
            return torch.tensor(float("nan"), device=batches[0][0].input_ids.device)
        measured = self.validate([batch for batch, _ in batches])
        effects, weights = measured["memory_effect"], measured["nll"].new_tensor([weight for _, weight in batches])
        return (weights * effects).mean() * (weights.sum() / (weights * measured["swapped"]).sum())

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, Tensor]:
        """What the memory is worth on some batches, each value [N], in nats per token.

        Returns:
            "nll": answer NLL; "memory_effect": the answer NLL with another paper's memory less that, to which questions
            of texts without a token add nothing; "swapped": the share of the other questions. The last two are left out
            where all contexts with a token are of one paper.
        """
        (model,) = self.model
        memory = DeltaMemory.cat([model.write(**_written(batch)) for batch in batches])
        firsts = itertools.accumulate((len(batch.papers) for batch in batches), initial=0)
        owners = [batch.owner + first for batch, first in zip(batches, firsts, strict=False)]
        nll = self._nlls(batches, memory, owners)
        papers = _papers(batches)
        if _of_one_paper(papers):
            return {"nll": nll}
        others = torch.tensor(_others(papers), device=nll.device)
        wrong = self._nlls(batches, memory, [others[own] for own in owners])
        swapped = torch.stack([(others[own] != own).float().mean() for own in owners])
        return {"nll": nll, "memory_effect": wrong - nll, "swapped": swapped}

    def _nlls(self, batches: Sequence[EpisodeBatch], memory: DeltaMemory, rows: Sequence[Tensor]) -> Tensor:
        """Of each batch, [N], with the rows of the memory that its questions are given."""
        return torch.stack(
            [answer_nll(self._nll(b, memory.select(own)), b) for b, own in zip(batches, rows, strict=True)]
        )

    def _nll(self, batch: Reads, memory: DeltaMemory) -> Tensor:
        """Of each answer token, read from a memory of Q rows; [A]."""
        return token_nll(self._logits(batch, memory), batch)

    def _logits(self, batch: Reads, memory: DeltaMemory) -> Tensor:
        """Before each answer token, [A, V]."""
        (model,) = self.model
        options = {"memory": memory, "write": self.write_questions, "right_padded": True}
        return answer_logits(model, model.base_model, batch, **options)


def _written(texts: Texts) -> dict[str, Any]:
    """Texts as :meth:`DeltaMemModel.write` takes them."""
    return {
        "input_ids": texts.context_ids,
        "attention_mask": texts.context_mask,
        "segment_ids": texts.segment_ids,
        "right_padded": True,
    }


def _mean_norm(memory: DeltaMemory, mask: Tensor | None) -> Tensor:
    """Of the states, over all layers and the texts that have a token; a scalar, 0 where none has."""
    norms = torch.stack(list(memory.norms().values())).mean((0, 2))
    if mask is None:
        return norms.mean()
    texts = mask.any(1).to(norms.dtype)
    return (norms * texts).sum() / texts.sum().clamp_min(1)


def _papers(batches: Sequence[EpisodeBatch]) -> list[str | None]:
    """The paper of every text, None where it has no token."""
    found: list[str | None] = []
    for batch in batches:
        written = [True] * len(batch.papers) if batch.context_mask is None else batch.context_mask.any(1).tolist()
        found += [paper if has_token else None for paper, has_token in zip(batch.papers, written, strict=True)]
    return found


def _of_one_paper(papers: Sequence[str | None]) -> bool:
    return len({*papers} - {None}) < 2


def _others(papers: Sequence[str | None]) -> list[int]:
    """For each of some papers, not all the same, the place of the next one, round in a ring, that is another.

    None stands for no paper: it is nobody's other one, and its own place is named for it.
    """
    count = len(papers)

    def other(place: int) -> int:
        unfit = (papers[place], None)
        return next(j % count for j in range(place + 1, place + count) if papers[j % count] not in unfit)

    return [place if paper is None else other(place) for place, paper in enumerate(papers)]
