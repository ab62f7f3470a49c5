"""What a model makes of answers: the logits before them, their likelihood, and what is learnt from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.training.batches import EpisodeBatch, Reads

MARGIN = 1.0
"""Nats per answer token by which a contrast wants another document's memory to be worse."""


def answer_logits(model: nn.Module, base: PreTrainedModel, batch: Reads, **options) -> Tensor:
    """Logits [A, V] before each answer token; at other places none are computed.

    Args:
        model: what reads the questions, with ``options``; ``base`` is the backbone inside it.
    """

    def only_answers(head: nn.Module, args: tuple) -> tuple[Tensor]:
        (hidden,) = args
        return (hidden[batch.answer_rows, batch.answer_columns].unsqueeze(0),)

    hook = base.get_output_embeddings().register_forward_pre_hook(only_answers)
    try:
        return model(batch.input_ids, use_cache=False, **options).logits[0]
    finally:
        hook.remove()


def token_nll(logits: Tensor, batch: Reads) -> Tensor:
    """Negative log-likelihood of each answer token in nats, [A] float32, from logits [A, V]."""
    return F.cross_entropy(logits.float(), batch.answer_ids, reduction="none")


def divergence(frozen: Tensor, adapted: Tensor) -> Tensor:
    """KL(frozen ‖ adapted) at each answer token in nats, [A] float32, from logits [A, V]."""
    expected, found = (logits.float().log_softmax(-1) for logits in (frozen, adapted))
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


def answer_nll(nll: Tensor, batch: Reads) -> Tensor:
    """Mean over questions of the mean over their answers' tokens, a scalar, from the tokens' [A]."""
    return (nll * batch.answer_weights).sum()


def told_apart(right: Tensor, wrong: Tensor, batch: Reads, has_other: Tensor) -> Tensor:
    """Mean over questions of softplus(margin − (NLL with another's memory − NLL with the right one)), a scalar.

    Args:
        right, wrong: NLL of the answer tokens, [A] nats.
        has_other: [Q] bool, the questions that there is another's memory for; the rest count as zero.
    """
    # products, because sums by index come in no fixed order on a GPU
    tokens_of = F.one_hot(batch.answer_rows, len(batch.owner)).to(right.dtype).T
    weights = tokens_of @ batch.answer_weights
    gaps = (tokens_of @ ((wrong - right) * batch.answer_weights)) / weights.clamp_min(1e-30)
    return (has_other * weights * F.softplus(MARGIN - gaps)).sum()


def nll_by_source(nll: Tensor, batch: EpisodeBatch, sources: Sequence[str]) -> Tensor:
    """For each of S sources the sum over its questions of the mean over their answers' tokens, and how many they are.

    Args:
        nll: of the tokens, [A].

    Returns:
        [S, 2] float32: sums of micro-batches and workers are sums over all their questions.
    """
    places = torch.tensor([sources.index(name) for name in batch.sources], device=nll.device)
    of_question = F.one_hot(places, len(sources)).float()
    weighted = nll * batch.answer_weights * len(batch.owner)
    # products, because sums by index come in no fixed order on a GPU
    return torch.stack([of_question[batch.answer_rows].T @ weighted, of_question.sum(0)], dim=1)
