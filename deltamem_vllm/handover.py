"""What a request tells the engine about its memory, and how a memory travels between processes.

It stands in the request's ``kv_transfer_params`` under the key ``deltamem``. Whatever a client may have put there is
checked here, and an error is a value: an exception in vLLM's scheduler would end the engine.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltamem.config import DeltaMemConfig
from deltamem.errors import DeltaMemError, MemoryMismatchError
from deltamem.memory import DeltaMemory
from deltamem_vllm.names import REQUEST
from deltamem_vllm.page import NEVER, SETTINGS, page_size, state_size

if TYPE_CHECKING:
    from deltamem_vllm.adapters import Adapters

LONGEST_KEY = 200


@dataclass(frozen=True)
class Handover:
    """What a request says.

    Attributes:
        memory: the states of all layers, float32 as they lie in memory (over HTTP in base64); None: an empty memory.
        write_from: tokens before this position of the whole sequence are only read; None: all are. 0 writes all.
        strength: how strongly the memory steers.
        keep: under this key the worker keeps the memory after the last token that was fed; None: it is forgotten.
        adapter: its name; None: the engine's first, or only one.
    """

    memory: bytes | None = None
    write_from: int | None = 0
    strength: float = 1.0
    keep: str | None = None
    adapter: str | None = None

    def params(self) -> dict[str, Any]:
        """As a request's ``kv_transfer_params``."""
        return {REQUEST: {field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def parse(cls, params: Any, adapters: Adapters) -> Handover:
        """What a request's ``kv_transfer_params`` say; without them an empty memory, which is written.

        The adapter is named in what is returned.

        Raises:
            DeltaMemError: they make no sense.
        """
        said = params.get(REQUEST, {}) if isinstance(params, dict) else {}
        known = {field.name for field in fields(cls)}
        if not isinstance(said, dict) or not known.issuperset(said):
            raise DeltaMemError(f"{REQUEST} takes {', '.join(sorted(known))}, got {said!r:.100}")
        names = list(adapters.configs)
        name = said.get("adapter") or names[0]
        if name not in names:
            raise DeltaMemError(f"there is no adapter {name!r:.100} here; there are {', '.join(names)}")
        nbytes = 4 * len(adapters.layers) * state_size(adapters.configs[name])
        found = cls(**{**said, "memory": _raw(said.get("memory")), "adapter": name})
        if found.memory is not None and len(found.memory) != nbytes:
            raise MemoryMismatchError(f"this adapter's memories have {nbytes} bytes, got {len(found.memory)}")
        if found.memory is not None and not bool(_numbers(found.memory).isfinite().all()):
            raise MemoryMismatchError("the memory holds numbers that aren't finite")
        start, strength, key = found.write_from, found.strength, found.keep
        if start is not None and (isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < NEVER):
            raise DeltaMemError(f"write_from must be a position or null, got {start!r:.50}")
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise DeltaMemError(f"strength must be a finite number, got {strength!r:.50}")
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= LONGEST_KEY):
            raise DeltaMemError(f"keep must be a text of at most {LONGEST_KEY} characters, got {key!r:.50}")
        return found

    @property
    def salt(self) -> str:
        """Differs where cached keys, values and states would differ."""
        total = hashlib.sha256(self.memory or b"")
        total.update(f"{self.write_from} {float(self.strength)} {self.adapter}".encode())
        return total.hexdigest()

    def pages(self, adapters: Adapters) -> Tensor:
        """The first page of each layer, [layers, page] float32, once :meth:`parse` has named the adapter."""
        from deltamem_kernels.limits import limited  # with numba, which vLLM's start can't stand (layer.py)

        assert self.adapter is not None
        pages = torch.zeros(len(adapters.layers), page_size(adapters.shape))
        if self.memory is not None:
            config, number = adapters.configs[self.adapter], adapters.number(self.adapter)
            states = _numbers(self.memory).view(len(pages), config.states, config.rank, config.rank)
            states = limited(states, adapters.limits[number]).flatten(1)
            pages[:, : states.shape[1]] = states
        pages[:, -SETTINGS] = adapters.number(self.adapter)
        pages[:, -2] = NEVER if self.write_from is None else self.write_from
        pages[:, -1] = self.strength
        return pages


def _raw(memory: Any) -> bytes | None:
    if memory is None or isinstance(memory, bytes):
        return memory
    if not isinstance(memory, str):
        raise DeltaMemError(f"memory must be base64, got {type(memory).__name__}")
    try:
        return base64.b64decode(memory, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DeltaMemError(f"memory isn't base64: {error}") from error


def _numbers(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


def to_bytes(memory: DeltaMemory) -> bytes:
    """A memory of one sequence, its layers in order."""
    return torch.stack([memory.states[layer][0] for layer in sorted(memory.states)]).float().cpu().numpy().tobytes()


def from_bytes(raw: bytes, config: DeltaMemConfig, layers: Sequence[int]) -> DeltaMemory:
    """The inverse of :func:`to_bytes`."""
    shape = (len(layers), 1, config.states, config.rank, config.rank)
    states = _numbers(raw).view(shape)
    return DeltaMemory({layer: states[row].clone() for row, layer in enumerate(layers)})
