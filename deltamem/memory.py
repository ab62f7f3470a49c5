"""The memory as a value: one small float32 state per layer and sequence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltamem.errors import MemoryMismatchError
from deltamem.tensor_files import save_tensors

FORMAT = "deltamem-memory-1"


@dataclass(frozen=True)
class DeltaMemory:
    """What a batch of sequences has written so far: the states S of the paper's Method.

    Values are never changed in place: a forward pass takes one memory and returns another. A read is S q (step 3), so
    row i of a state belongs to read channel i and is gated by β_i as it is written (step 5); columns are key channels.

    Attributes:
        states: {layer index: float32 [B, N, r, r]}, B sequences, N states of rank r; zero where nothing was written.
        metadata: strings saved beside the states (which adapter wrote them, say).

    Raises:
        MemoryMismatchError: there is no state, or not all have one shape.
    """

    states: Mapping[int, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {tuple(state.shape) for state in self.states.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 4:
            raise MemoryMismatchError(f"a memory needs one [B, N, r, r] state per layer, got shapes {sorted(shapes)}")

    @property
    def batch_size(self) -> int:
        """How many sequences B it is of."""
        return next(iter(self.states.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the states are; all are on one device."""
        return next(iter(self.states.values())).device

    def _map(self, function) -> DeltaMemory:
        return DeltaMemory({i: function(s) for i, s in self.states.items()}, self.metadata)

    def to(self, device: torch.device | str) -> DeltaMemory:
        """The same memory on another device (states stay float32)."""
        return self._map(lambda state: state.to(device))

    def select(self, rows: Tensor | Iterable[int]) -> DeltaMemory:
        """Rows of the batch, in the order given; a row may be taken several times (one context, many questions).

        Args:
            rows: [R] int, each from 0 to B - 1.

        Raises:
            IndexError: a row that the batch doesn't have.
        """
        index = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.long)
        index = index.to(self.device)
        return self._map(lambda state: state.index_select(0, index))

    def detach(self) -> DeltaMemory:
        """The same states without the passes that gradients would go back to."""
        return self._map(Tensor.detach)

    def norms(self) -> dict[int, Tensor]:
        """Frobenius norm of every state: {layer index: float32 [B, N]}."""
        return {i: state.flatten(2).norm(dim=-1) for i, state in self.states.items()}

    @staticmethod
    def cat(memories: Iterable[DeltaMemory]) -> DeltaMemory:
        """Memories of several sequences as one batch; it has the first one's metadata.

        Raises:
            MemoryMismatchError: there are none, or not all are of one adapter's shape.
        """
        memories = list(memories)
        shapes = {tuple((i, *state.shape[1:]) for i, state in memory.states.items()) for memory in memories}
        if len(shapes) != 1:
            raise MemoryMismatchError(
                "there is no memory to join"
                if not memories
                else f"memories of {len(shapes)} shapes don't make one batch"
            )
        return DeltaMemory(
            {i: torch.cat([m.states[i] for m in memories]) for i in memories[0].states}, memories[0].metadata
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; bit-exact.

        Raises:
            OSError: it can't be written.
        """
        tensors = {f"states.{i}": state.detach().cpu().contiguous() for i, state in self.states.items()}
        save_tensors(tensors, Path(path), {"format": FORMAT, "metadata": json.dumps(dict(self.metadata))})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> DeltaMemory:
        """Read what :meth:`save` wrote.

        Raises:
            MemoryMismatchError: the file is not a saved memory.
            OSError: there is no such file, or it can't be read.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise MemoryMismatchError(f"{path} is a safetensors file but not a saved memory ({FORMAT})")
                states = {int(name.removeprefix("states.")): file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise MemoryMismatchError(f"{path} is not a saved memory: {error}") from error
        return cls(dict(sorted(states.items())), json.loads(header["metadata"]))
