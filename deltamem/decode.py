"""Greedy decoding as a replayed CUDA graph: at one token a step, launching kernels costs more than running them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from deltamem.errors import DeltaMemError
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel
from deltamem.steering import DeltaCall


class GraphDecoder:
    """Decodes a fixed number of rows of a fixed width, with or without a memory.

    The token, its position, the mask, the KV cache and the memory's states live in buffers that one captured step
    reads and updates; :meth:`decode` replays it. Greedy only, and without an end-of-sequence check: the host never
    waits for the device between tokens.

    Args:
        model: a DeltaMemModel, or a bare backbone (then there is no memory).
        batch_size: rows decoded together.
        max_length: tokens of the cache, prompt included.

    Raises:
        DeltaMemError: the model isn't on a GPU.
    """

    def __init__(self, model: DeltaMemModel | PreTrainedModel, batch_size: int, max_length: int):
        if model.device.type != "cuda":
            raise DeltaMemError("GraphDecoder captures CUDA graphs; on this device use generate()")
        self.model = model
        self.base = model.base_model if isinstance(model, DeltaMemModel) else model
        device = self.base.device
        self.max_length = max_length
        self.cache = StaticCache(config=self.base.config.get_text_config(decoder=True), max_cache_len=max_length)
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch_size, 1, 1, max_length, dtype=torch.bool, device=device)
        self.memory: DeltaMemory | None = None
        if isinstance(model, DeltaMemModel):
            self.memory = model.new_memory(batch_size)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, memory: DeltaMemory | None = None):
        """Read and write the prompt [B, T] (left-padded), and choose the first token."""
        length = input_ids.shape[1]
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        options["position_ids"] = (valid.cumsum(1) - 1).clamp_min(0)
        if self.memory is None:
            out = self.base(input_ids, attention_mask=attention_mask, **options)
        else:
            out = self.model(input_ids, attention_mask=attention_mask, memory=memory, **options)
            for i, state in out.memory.states.items():
                self.memory.states[i].copy_(state)
        self.mask.zero_()
        self.mask[:, 0, 0, :length] = valid.bool()
        self.column.fill_(length)
        self.position.copy_(valid.sum(1, keepdim=True))
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def decode(self, tokens: int) -> Tensor:
        """Feed the chosen token and choose the next, ``tokens`` times; the tokens fed, [B, tokens]."""
        if self.graph is None:
            self._capture()
        fed = []
        for _ in range(tokens):
            fed.append(self.token.clone())
            self.graph.replay()
        return torch.cat(fed, 1)

    def _step(self) -> None:
        self.mask.index_fill_(3, self.column, True)
        call = {}
        if self.memory is not None:
            # the states are updated in place: no other pass can be reading these buffers
            states = dict(self.memory.states)
            call = {"delta_call": DeltaCall(states, memory_out=states, in_place=True)}
        out = self.base(
            self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            **call,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position += 1
        self.column += 1

    def _capture(self) -> None:
        """Warm up on the side and undo it, then record one step."""
        kept = [self.token, self.position, self.column, self.mask]
        kept += list(self.memory.states.values()) if self.memory else []
        kept += [layer.cumulative_length for layer in self.cache.layers]
        before = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
