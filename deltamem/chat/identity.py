"""TODO deltamem/chat/identity.py."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Reading 16 GB of weights takes ten seconds or more, and every restored chat has a runtime of its own.
_HASHED: WeakKeyDictionary[PreTrainedModel, tuple[list, list[str]]] = WeakKeyDictionary()


def _hash(tensors: dict[str, Tensor]) -> list[str]:
    """sha256 of each tensor, side by side: hashing 8 GB one after the other takes ten seconds."""

    def of_tensor(tensor: Tensor) -> str:
        raw = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(raw).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(of_tensor, tensors.values()))


def _digest(facts: dict, tensors: dict[str, Tensor], hashes: list[str]) -> str:
    total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for (name, tensor), digest in zip(tensors.items(), hashes, strict=True):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest}\n".encode())
    return total.hexdigest()
