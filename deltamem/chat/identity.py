"""Which adapter and which backbone a saved chat belongs to: digests over what they compute, not over their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem.adapters.tensors import collect_tensors
from deltamem.model import DeltaMemModel

# Reading 16 GB of weights takes ten seconds or more, and every restored chat has a runtime of its own.
_HASHED: WeakKeyDictionary[PreTrainedModel, tuple[list, list[str]]] = WeakKeyDictionary()


def adapter_digest(model: DeltaMemModel) -> str:
    """sha256 over the adapter's function: its configuration (not the backbone's name) and its tensors."""
    config = model.config.to_dict()
    for name in ("base_model_name_or_path", "revision"):
        del config[name]
    tensors = collect_tensors(model.memory_layers.state_dict(), model.config)
    return _digest(config, tensors, _hash(tensors))


def backbone_digest(base: PreTrainedModel) -> str:
    """sha256 over the backbone's weights, class and position encoding; taken once per backbone in memory."""
    config = base.config.get_text_config(decoder=True)
    facts = {"class": type(base).__name__, "rope": getattr(config, "rope_parameters", None)}
    tensors = dict(plain for name, parameter in base.named_parameters() for plain in _plain(name, parameter.detach()))
    unchanged = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors.values()]
    if base not in _HASHED or _HASHED[base][0] != unchanged:
        _HASHED[base] = unchanged, _hash(tensors)
    return _digest(facts, tensors, _HASHED[base][1])


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a quantised weight is made of; of any other weight itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


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
