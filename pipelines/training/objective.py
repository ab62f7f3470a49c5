"""The loss of an episode: write the context, answer the question from the memory alone (paper, Training recipe)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem import DeltaMemModel
from pipelines.training.batches import EpisodeBatch


class EpisodeLoss(NamedTuple):
    """Scalars of one micro-batch; ``loss`` is what is minimised."""

    loss: Tensor
    answer_nll: Tensor
    write_gate: Tensor
    state_norm: Tensor


class MemoryObjective(nn.Module):
    """What DeepSpeed trains: only the adapter is in its module tree, so only the adapter is in its checkpoints.

    Args:
        write_penalty, write_target: weight w and target g of the penalty w · mean_layers((mean β - g)²), taken from
            the gates of the write pass.
    """

    def __init__(self, model: DeltaMemModel, write_penalty: float, write_target: float):
        super().__init__()
        self.adapter = model.memory_layers
        self.model = (model,)  # a tuple hides the frozen backbone from the module tree
        self.write_penalty, self.write_target = write_penalty, write_target

    def forward(self, batch: EpisodeBatch) -> EpisodeLoss:
        (model,) = self.model
        gates: dict[int, Tensor] = {}
        memory = model.write(batch.context_ids, batch.context_mask, segment_ids=batch.segment_ids, gates=gates)
        out = model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            memory=memory.select(batch.owner),
            write=False,
            position_ids=(batch.attention_mask.cumsum(1) - 1).clamp_min(0),
            logits_to_keep=batch.longest_answer + 1,
            use_cache=False,
        )
        nll = answer_nll(out.logits, batch).mean()
        gate = torch.stack(list(gates.values()))
        penalty = self.write_penalty * (gate - self.write_target).square().mean()
        norms = torch.stack(list(memory.detach().norms().values())).mean()
        return EpisodeLoss(nll + penalty, nll.detach(), gate.detach().mean(), norms)


def answer_nll(logits: Tensor, batch: EpisodeBatch) -> Tensor:
    """Mean negative log-likelihood per answer token of each question, in nats: [Q].

    Args:
        logits: [Q, longest_answer + 1, V], those of the last tokens; rows end with their answers.
    """
    longest = batch.longest_answer
    targets = batch.input_ids[:, -longest:]
    back = torch.arange(longest, 0, -1, device=targets.device)
    inside = back <= batch.answer_lengths.unsqueeze(1)
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return (nll * inside).sum(1) / batch.answer_lengths
