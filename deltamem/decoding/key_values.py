"""The key-value cache as a value, so that a chat can be forked, undone, saved and batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


@dataclass(frozen=True)
class KeyValues:
    """What every layer's attention has seen.

    Attributes:
        layers: for each layer (keys, values), both [B, heads, T, head_dim] in the backbone's dtype; empty before the
            first token.
    """

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @classmethod
    def from_cache(cls, cache: Cache) -> KeyValues:
        """The cache's tensors, not copied: appending replaces them and never changes them."""
        layers: list[Any] = list(cache.layers)
        return cls(tuple((layer.keys, layer.values) for layer in layers))

    def to_cache(self) -> DynamicCache:
        """A cache that a forward pass may append to.

        It is made without the model's config, so that layers with sliding attention keep all tokens, too
        (their mask still hides the old ones): a layer that dropped them could not be cut.
        """
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)
        return cache

    def cut(self, start: int, stop: int) -> KeyValues:
        """Tokens start:stop, as views."""
        if start == stop:
            return KeyValues()
        return self._map(lambda x: x[:, :, start:stop])

    def extend(self, other: KeyValues) -> KeyValues:
        if not self.layers:
            return other
        pairs = zip(self.layers, other.layers, strict=True)
        return KeyValues(tuple((torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2)) for a, b in pairs))

    def _map(self, function) -> KeyValues:
        return KeyValues(tuple((function(keys), function(values)) for keys, values in self.layers))
