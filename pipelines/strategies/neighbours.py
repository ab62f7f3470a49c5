"""What a retriever would say next: for every token of a corpus, the tokens that followed similar ones elsewhere in it.

The keys are the backbone's last hidden states, the values the tokens that come next; the distribution of a key's next
token is that of its nearest others, each weighed by exp(−d² / temperature). As in MLP Memory (arXiv 2508.01832).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config.strategies import MlpMemoryStrategy
from pipelines.errors import StageError

_AT_ONCE = 1024


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
    def of(
        cls,
        texts: Iterable[tuple[str, NDArray[np.float32], NDArray[np.int64]]],
        settings: MlpMemoryStrategy,
        device: torch.device | None = None,
    ) -> Neighbours:
        """The neighbours of every token.

        Args:
            texts: each one's name, the states of its tokens, [T, h], and their ids, [T].
            device: where PyTorch searches if the index is Flat; None: faiss does, on the CPU.

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
        stored = np.concatenate(keys)
        exact = device is not None and settings.index == "Flat"
        index = _ExactIndex(stored, device) if exact else _faiss_index(stored, settings)
        following = torch.from_numpy(np.concatenate(values)).to(device, torch.int32)
        nearest = min(settings.neighbours, count - 1)
        tokens = torch.empty(count, nearest, dtype=torch.int32)
        weights = torch.empty(count, nearest, dtype=torch.float16)
        entropy = torch.empty(count)
        for start in range(0, count, _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            distances, found = (
                torch.as_tensor(part, device=device) for part in index.search(stored[rows], nearest + 1)
            )
            found, share = _others(distances, found, start, settings.temperature)
            named = following[found]
            tokens[rows], weights[rows], entropy[rows] = named.cpu(), share.half().cpu(), _entropy(named, share).cpu()
        return cls(tokens, weights, entropy, first)

    def divergence(self, keys: Tensor, log_probabilities: Tensor) -> Tensor:
        """KL(neighbours ‖ network) of some keys, [n] nats, from the network's log probabilities, [n, V]."""
        device = log_probabilities.device
        tokens, weights = self.tokens[keys].to(device).long(), self.weights[keys].to(device).float()
        return -(weights * log_probabilities.gather(1, tokens)).sum(1) - self.entropy[keys].to(device)


class _ExactIndex:
    """The search of faiss's flat index on a device: seconds on a GPU for what takes a CPU hours."""

    def __init__(self, keys: NDArray[np.float32], device: torch.device | None):
        self.keys = torch.from_numpy(keys).to(device)
        self.norms = self.keys.square().sum(1)

    def search(self, queries: NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
        """Squared distances to the nearest keys, nearest first, and their numbers, [n, count]."""
        asked = torch.from_numpy(queries).to(self.keys.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # a distance is a small difference of large products
        try:
            nearest = torch.addmm(self.norms, asked, self.keys.T, alpha=-2).topk(count, largest=False)
        finally:
            torch.set_float32_matmul_precision(precision)
        return (nearest.values + asked.square().sum(1, keepdim=True)).clamp_min(0), nearest.indices


def _faiss_index(keys: NDArray[np.float32], settings: MlpMemoryStrategy) -> Any:
    import faiss  # not needed where a GPU searches

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


def _others(distances: Tensor, found: Tensor, start: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The nearest keys but the key itself, [n, k], and their weights, from k + 1 that were found for each of n keys."""
    own = found == torch.arange(start, start + len(found), device=found.device)[:, None]
    own[~own.any(1), -1] = True  # among equals the key itself may be missing: then the farthest goes
    shape = len(found), found.shape[1] - 1
    found, distances = found[~own].view(shape), distances[~own].view(shape)
    missing = found < 0  # lists that an IVF index searched may hold fewer
    scores = (-distances / temperature).masked_fill(missing, float("-inf"))
    return found.clamp_min(0), scores.softmax(1).nan_to_num()


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
