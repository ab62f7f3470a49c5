"""Decoding in slots: sequences of different lengths, each with its own memory, advance together one token at a time.

At one token a step, launching kernels costs more than running them, so on a GPU the step is captured once as a CUDA
graph and replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deltamem.backbone.calls import checked_strength
from deltamem.backbone.steering import DeltaCall
from deltamem.decoding.attention import PREFIXED, SLOTS, with_attention
from deltamem.decoding.compiled import with_compiled_layers
from deltamem.decoding.key_values import KeyValues
from deltamem.decoding.slots import SlotCache
from deltamem.errors import DeltaMemError
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel, backbone_of

log = logging.getLogger("deltamem.decoding")

STEPS_PER_LOOK = 16
"""Greedy steps between two looks at whether all sequences have ended: each look waits for the device."""


class SlotDecoder:
    """Decodes up to ``slots`` sequences side by side; they may come and go between steps.

    Each slot's token, keys, values and memory lie in buffers that one step reads and updates in place.

    Args:
        model: a DeltaMemModel, or a bare backbone (then there is no memory).
        capacity: tokens that a slot can hold, prompt included.
        prefix: keys and values [1, …] of a beginning that all sequences share. Slots hold what comes after it.
        compiled: compile the layers (:mod:`deltamem.decoding.compiled`), which takes seconds at the first step, or a
            fraction where the compiler has kept its work. The adapter's weights are taken as they are now. Not after a
            shared beginning.

    Attributes:
        token: [slots, 1] int64, what the next step feeds; a step leaves the likeliest next token here.
        logits: [slots, V], the last step's.
    """

    def __init__(
        self,
        model: DeltaMemModel | PreTrainedModel,
        slots: int,
        capacity: int,
        prefix: KeyValues | None = None,
        compiled: bool = False,
    ):
        self.model, self.slots, self.capacity, self.prefix = model, slots, capacity, prefix
        self._with_memory = model if isinstance(model, DeltaMemModel) else None
        self.base = backbone_of(model)
        self._stepped = with_attention(self.base, PREFIXED if prefix else SLOTS)
        self._compiled: PreTrainedModel | None = None
        if compiled and not prefix:
            log.warning("compiling the layers for %d slots: their first step may take a minute", slots)
            memory_layers = None if self._with_memory is None else self._with_memory.memory_layers
            self._compiled = with_compiled_layers(self.base, memory_layers)
        device = self.base.device
        self.cache = SlotCache(slots, capacity, device)
        self.token = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.writes = torch.zeros(slots, dtype=torch.bool, device=device)
        self.strength = torch.ones(slots, device=device)
        self._as_trained = True  # the usual case needs no product with the strength
        self.memory: DeltaMemory | None = self._with_memory.new_memory(slots) if self._with_memory else None
        self.logits: Tensor = torch.empty(0)  # the first step knows their shape and dtype
        self._lengths = [-1] * slots  # of the slots in use; known without asking the device
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def fill(
        self,
        slots: Sequence[int],
        keys: KeyValues,
        tokens: Tensor,
        memory: DeltaMemory | None = None,
        mask: Tensor | None = None,
        write: bool = True,
        strength: float | None = None,
    ) -> None:
        """Start sequences in slots; what was there is gone.

        Args:
            keys: of n sequences that have been read; sequence i goes into ``slots[i]``.
            tokens: [n], the token that each is fed first.
            memory: of n sequences; None means empty ones.
            mask: [n, T], 0 marks padding among the keys; None: there is none.
            write: whether these sequences write their memory as they go on.
            strength: of their steering; None: the model's.

        Raises:
            DeltaMemError: a sequence is as long as a slot.
        """
        if keys.length >= self.capacity:
            raise DeltaMemError(f"a sequence of {keys.length} tokens leaves no room in slots of {self.capacity}")
        index = torch.tensor(list(slots), device=self.token.device)
        self.cache.fill(slots, keys, mask)
        self.token[index, 0] = tokens
        self.active[index], self.writes[index] = True, write
        if self._with_memory is not None:
            self._set_strength(index, checked_strength(self._with_memory.strength if strength is None else strength))
        for slot in slots:  # padded ones may be shorter: an upper bound is enough to watch the capacity
            self._lengths[slot] = keys.length
        for i, state in (self.memory.states if self.memory else {}).items():
            state[index] = 0 if memory is None else memory.states[i]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Feed every slot's token; returns the logits [slots, V], which the next step overwrites.

        Raises:
            DeltaMemError: a slot is full.
        """
        if max(self._lengths) >= self.capacity:
            raise DeltaMemError(f"slots of {self.capacity} tokens are full")
        # a first pass over nothing makes the slots' buffers, which what is captured must find there
        if self.token.device.type != "cuda" or self._bare() or not self.cache.layers_keys:
            self._step()
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        self._lengths = [length + 1 if length >= 0 else -1 for length in self._lengths]
        return self.logits

    @torch.no_grad()
    def take(self, slot: int) -> tuple[KeyValues, DeltaMemory | None]:
        """A copy of what a slot holds."""
        keys = self.cache.take(slot, int(self.cache.lengths[slot]))
        return keys, self.memory.select([slot]) if self.memory else None

    def free(self, slots: Iterable[int]) -> None:
        """Empty slots."""
        slots = list(slots)
        self.active[slots] = False
        self.cache.lengths[slots] = 0  # a step runs over empty slots, too: over few keys, and within the capacity
        for slot in slots:
            self._lengths[slot] = -1

    def generate(
        self,
        limits: Sequence[int],
        end_ids: Collection[int],
        write: bool | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[int]]:
        """Continuations of the first ``len(limits)`` slots, the tokens fed first not among them.

        Args:
            limits: tokens of each at most.
            end_ids: tokens after which a sequence has ended; they aren't returned.
            write: whether they write after the tokens fed first; None: as they were filled.
            choose: from their logits, [n, V], to their next tokens, [n]; None: the likeliest.
        """
        ends = torch.tensor(sorted(end_ids), device=self.token.device)
        chosen: list[Tensor] = []
        ended = torch.zeros(len(limits), dtype=torch.bool, device=self.token.device)
        for done in range(1, max(limits) + 1):
            logits = self.step()
            if choose is not None:
                self.token[: len(limits), 0] = choose(logits[: len(limits)])
            if done == 1 and write is not None:
                self.writes[: len(limits)] = write
            chosen.append(self.token[: len(limits), 0].clone())
            if done % STEPS_PER_LOOK == 0:
                ended |= torch.isin(torch.stack(chosen[-STEPS_PER_LOOK:], 1), ends).any(1)
                if bool((ended | torch.tensor([limit <= done for limit in limits], device=ended.device)).all()):
                    break
        rows = torch.stack(chosen, 1).tolist()
        return [_until(row[:limit], end_ids) for row, limit in zip(rows, limits, strict=True)]

    def prefill(self, input_ids: Tensor, memory: DeltaMemory | None = None) -> None:
        """Read and write a prompt [slots, T], and choose the first token of each slot."""
        cache = DynamicCache(config=self.base.config)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            if self.memory is None:
                out = self.base(input_ids, **options)
            else:
                segments = torch.zeros_like(input_ids, device="cpu")
                out = self.model(input_ids, memory=memory, segment_ids=segments, **options)
                memory = out.memory
            self.fill(range(self.slots), KeyValues.from_cache(cache), out.logits[:, -1].argmax(-1), memory)

    def _bare(self) -> bool:
        """Whether this is inside the model's ``disable_adapter``."""
        return self._with_memory is not None and self._with_memory.adapter_disabled

    def _set_strength(self, slots: Tensor, strength: float) -> None:
        if strength != 1 and self._as_trained:
            self._as_trained, self._graph = False, None
        self.strength[slots] = strength

    def _step(self) -> None:
        call = {}
        if self._with_memory is not None and self.memory is not None and not self._bare():
            # the states are updated in place: no other pass can be reading these buffers
            states = dict(self.memory.states)
            call["delta_call"] = DeltaCall(
                self._with_memory.memory_layers,
                states,
                strength=1.0 if self._as_trained else self.strength,
                memory_out=states,
                in_place=True,
                writes=self.active & self.writes,
            )
        lengths = self.cache.lengths[:, None]
        if self.prefix:
            seen = torch.arange(self.capacity, device=lengths.device) <= lengths
            places = {"attention_mask": seen[:, None, None], "position_ids": lengths + self.prefix.length}
            call["shared_prefix"] = self.prefix
        else:
            places = {"attention_mask": (lengths + 1)[:, :, None, None], "position_ids": lengths}
        compiled = self._compiled if self.cache.layers_keys and not self._bare() else None
        out = (compiled or self._stepped)(
            self.token,
            **places,
            past_key_values=self.cache,
            use_cache=True,
            **call,
        )
        if not self.logits.numel():
            self.logits = torch.empty_like(out.logits[:, -1])
        self.logits.copy_(out.logits[:, -1])
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.cache.lengths.add_(self.active)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warm up on the side and undo it, then record one step."""
        kept = [self.token, self.cache.lengths, *(self.memory.states.values() if self.memory else ())]
        before = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # two would not fit where a slot has room for one more token
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the device, as those of a server that load and save sessions do
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph


def round_up(count: int, device: torch.device) -> int:
    """The number of slots, or of tokens in a slot, to make for ``count``: on a GPU at most a quarter more.

    A decoder with a captured step is dear to make and worth keeping for other batches, and its empty slots cost next to
    nothing; elsewhere an empty slot costs as much as a full one.
    """
    if device.type != "cuda":
        return count
    step = max(1, (1 << count.bit_length()) // 8)
    return -(-count // step) * step


def _until(tokens: list[int], end_ids: Collection[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))]
