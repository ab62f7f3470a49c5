"""What a retriever would say next: for every token of a corpus, the tokens that followed similar ones elsewhere in it.

The keys are the backbone's last hidden states, the values the tokens that come next; the distribution of a key's next
token is that of its nearest others, each weighed by exp(−d² / temperature). As in MLP Memory (arXiv 2508.01832).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config.strategies import MlpMemoryStrategy
from pipelines.errors import StageError

_AT_ONCE = 4096


@dataclass(frozen=True)
class Neighbours:
    """Of each of N keys its k nearest others.

    Attributes:
        tokens: [N, k] int32, what came next there.
        weights: [N, k] float16, which sum to 1.
        entropy: [N] float32, of the distribution that they make, in nats.
        first: {text: number of its first key}; a text of T tokens has T − 1 keys, one after the other.
    """

    tokens: Tensor
    weights: Tensor
    entropy: Tensor
    first: dict[str, int]

    @classmethod
    def of(cls, texts: Iterable[tuple[str, NDArray[np.float32], NDArray[np.int64]]], settings: MlpMemoryStrategy):
        """The neighbours of every token.

        Args:
            texts: each one's name, the states of its tokens, [T, h], and their ids, [T].

        Raises:
            StageError: there are too few tokens, or faiss can't make the index.
        """
        first, keys, values, count = {}, [], [], 0
        for name, states, ids in texts:
            first[name] = count
            keys.append(states[:-1])
            values.append(ids[1:])
            count += len(ids) - 1
        if count < 2:
            raise StageError("strategies: mlp_memory needs training texts of more than two tokens to retrieve from")
        stored, following = np.concatenate(keys), np.concatenate(values)
        index = _index(stored, settings)
        nearest = min(settings.neighbours, count - 1)
        tokens = torch.empty(count, nearest, dtype=torch.int32)
        weights = torch.empty(count, nearest, dtype=torch.float16)
        entropy = torch.empty(count)
        for start in range(0, count, _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            found, share = _others(index, stored[rows], start, nearest, settings.temperature)
            tokens[rows] = torch.from_numpy(following[found].astype(np.int32))
            weights[rows] = share.half()
            entropy[rows] = _entropy(tokens[rows], share)
        return cls(tokens, weights, entropy, first)

    def divergence(self, keys: Tensor, log_probabilities: Tensor) -> Tensor:
        """KL(neighbours ‖ network) of some keys, [n] nats, from the network's log probabilities, [n, V]."""
        device = log_probabilities.device
        tokens, weights = self.tokens[keys].long().to(device), self.weights[keys].float().to(device)
        return -(weights * log_probabilities.gather(1, tokens)).sum(1) - self.entropy[keys].to(device)


def _index(keys: NDArray[np.float32], settings: MlpMemoryStrategy) -> faiss.Index:
    try:
        index = faiss.index_factory(keys.shape[1], settings.index, faiss.METRIC_L2)
        index.train(keys)
        index.add(keys)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise StageError(
            f"strategies: the index {settings.index!r} of mlp_memory can't be made of {len(keys)} tokens ({reason}); "
            "Flat always can"
        ) from error
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = settings.probes
    return index


def _others(
    index: faiss.Index, keys: NDArray[np.float32], start: int, nearest: int, temperature: float
) -> tuple[NDArray[np.int64], Tensor]:
    """The nearest keys but the key itself, [n, k], and their weights."""
    distances, found = index.search(keys, nearest + 1)
    own = found == np.arange(start, start + len(keys))[:, None]
    own[~own.any(1), -1] = True  # among equals the key itself may be missing: then the farthest goes
    shape = (len(keys), nearest)
    found, distances = found[~own].reshape(shape), distances[~own].reshape(shape)
    missing = found < 0  # lists that an IVF index searched may hold fewer
    scores = torch.from_numpy(-distances / temperature).masked_fill(torch.from_numpy(missing), float("-inf"))
    return np.where(missing, 0, found), scores.softmax(1).nan_to_num()


def _entropy(tokens: Tensor, weights: Tensor) -> Tensor:
    """Of each row's distribution over tokens, of which several neighbours may share one: [n] nats."""
    ordered, order = tokens.sort(dim=1)
    mass = weights.gather(1, order).double().cumsum(1)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    before = torch.where(last, mass, 0).cummax(1).values.roll(1, 1)
    before[:, 0] = 0
    share = torch.where(last, mass - before, 0)
    return -torch.special.xlogy(share, share).sum(1).float()
