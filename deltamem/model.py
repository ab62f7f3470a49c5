"""A frozen language model with a memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.adapters.locate import locate
from deltamem.adapters.tensors import collect_tensors, fill_layers
from deltamem.backbone.acceleration import keep_products
from deltamem.backbone.decoder import find_decoder
from deltamem.backbone.generation import GenerationMemory, attach_to_cache, insert_call, new_cache
from deltamem.backbone.no_cache import NoCache
from deltamem.backbone.steering import DeltaCall, attach, write_trunk
from deltamem.config import DeltaMemConfig
from deltamem.errors import ConfigError, DeltaMemError, MemoryMismatchError, SegmentsMissingError
from deltamem.layer import DeltaMemLayer, mean_gates
from deltamem.memory import DeltaMemory
from deltamem.segments import rank_segments


@dataclass
class DeltaMemOutput(CausalLMOutputWithPast):
    """transformers' own output, and the memory after the pass."""

    memory: DeltaMemory | None = None


class DeltaMemModel(nn.Module):
    """A causal language model, frozen, whose attention layers read and write a :class:`DeltaMemory`.

    Made by :func:`get_delta_mem_model` or :meth:`from_pretrained`. Nothing about a sequence is kept on the module:
    a memory goes in, a new one comes out.
    """

    def __init__(self, base_model: PreTrainedModel, config: DeltaMemConfig):
        super().__init__()
        decoder = find_decoder(base_model)
        depth = len(decoder.layers)
        indices = range(depth) if config.layers is None else config.layers
        if max(indices) >= depth:
            raise ConfigError(f"layers names layer {max(indices)}, but the backbone has layers 0 to {depth - 1}")
        base_model.requires_grad_(False)
        self.base_model, self.config = base_model, config
        self.memory_layers = nn.ModuleDict(
            {
                str(i): DeltaMemLayer(
                    config,
                    decoder.hidden_size,
                    {head: decoder.layers[i].projections[head].weight for head in config.steer},
                )
                for i in indices
            }
        )
        by_index = {int(i): layer for i, layer in self.memory_layers.items()}
        self._hooks = attach(decoder, by_index)
        self._hooks.append(base_model.register_forward_pre_hook(insert_call, with_kwargs=True))
        # tuples, so that the shared modules are not registered twice
        self._write_trunk = (write_trunk(decoder, by_index),)
        self._first_block = (decoder.layers[0].module,)
        self._adapter_disabled = False

    # --- passes -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: DeltaMemory | None = None,
        write: bool = True,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        right_padded: bool = False,
        **kwargs: Any,
    ) -> DeltaMemOutput:
        """Read, then (if asked) write, as the tokens pass.

        Args:
            input_ids: [B, T] int.
            attention_mask: [B, T], or [B, past + T] with a KV cache; 0 marks padding. None: every token counts.
            memory: None means a new, empty one. It is not changed.
            write: False reads only, and returns the memory as it came.
            segment_ids: [B, T] int for ssw; equal numbers make one segment, -1 is not written. On the CPU their number
                is known at once, which makes the write cheaper on a GPU too.
            labels: [B, T] int as transformers takes them (-100 is ignored).
            right_padded: your word that in every row the padding comes after the tokens. Causal attention then needs no
                mask, only the memory does, and the host never waits for the device. Not with a KV cache.
            **kwargs: what the backbone's forward takes (past_key_values, use_cache, logits_to_keep, …).

        Raises:
            SegmentsMissingError: ssw is to write several tokens and doesn't know the segments.
            MemoryMismatchError: the memory isn't this adapter's or this batch's.
        """
        if self._adapter_disabled:
            out = self.base_model(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            return DeltaMemOutput(**out, memory=memory)
        call = self.delta_call(input_ids, attention_mask, memory, write, segment_ids)
        if right_padded:
            if kwargs.get("past_key_values") is not None:
                raise DeltaMemError("right_padded: padding would lie between a KV cache and what follows; pad left")
            attention_mask = None
        if attention_mask is None and kwargs.get("use_cache") is False:
            kwargs.setdefault("past_key_values", self._no_cache())
        out = self.base_model(input_ids, attention_mask=attention_mask, labels=labels, delta_call=call, **kwargs)
        return DeltaMemOutput(**out, memory=self.memory_after(call, memory))

    def write(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: DeltaMemory | None = None,
        segment_ids: Tensor | None = None,
        right_padded: bool = False,
    ) -> DeltaMemory:
        """Write tokens into a memory; computes no logits and nothing after the last layer's memory.

        Arguments and errors as in :meth:`forward`.
        """
        call = self.delta_call(input_ids, attention_mask, memory, True, segment_ids)
        self._write(call, input_ids, attention_mask, right_padded)
        return self.memory_after(call, memory)

    def write_with_gates(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: DeltaMemory | None = None,
        segment_ids: Tensor | None = None,
        right_padded: bool = False,
    ) -> tuple[DeltaMemory, Tensor]:
        """:meth:`write`, and the mean write gate β of each layer that has a memory: [layers] float32, in their order.

        The gates carry gradients: the penalty on writing is made of them.
        """
        call = self.delta_call(input_ids, attention_mask, memory, True, segment_ids)
        call.written = {}
        self._write(call, input_ids, attention_mask, right_padded)
        biases = [self.memory_layers[str(i)].beta_bias for i in call.written]
        return self.memory_after(call, memory), mean_gates(biases, list(call.written.values()))

    def _write(self, call: DeltaCall, input_ids: Tensor, attention_mask: Tensor | None, right_padded: bool) -> None:
        self._write_trunk[0](
            input_ids,
            attention_mask=None if right_padded else attention_mask,
            past_key_values=self._no_cache() if right_padded or attention_mask is None else None,
            use_cache=False,
            delta_call=call,
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: DeltaMemory | None = None,
        write: bool = True,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ):
        """transformers' own ``generate`` (greedy, sampling, beams, any cache), reading and writing a memory.

        The prompt is read and written like in :meth:`forward`, each generated token as it is fed back; under ssw
        that makes each generated token a segment of its own. The last token generated is not fed, so not written.
        With ``return_dict_in_generate=True`` the result has ``.memory``, one row per sequence returned.

        Raises:
            DeltaMemError: an option that rolls the cache back (assisted decoding), or that does without a cache.
        """
        if self._adapter_disabled:
            return self.base_model.generate(input_ids, attention_mask=attention_mask, **kwargs)
        for option in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if kwargs.get(option) is not None:
                raise DeltaMemError(
                    f"{option}: assisted decoding rolls the cache back, which a memory can't follow; leave it out"
                )
        if kwargs.get("use_cache") is False:
            raise DeltaMemError("use_cache=False feeds the prompt again at every step and would write it again")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = kwargs.pop("past_key_values", None)
        if cache is None:
            cache = new_cache(self.base_model, input_ids.shape[1], kwargs)
        start = int(cache.get_seq_length())
        length = input_ids.shape[1] - start
        self._need_segments(segment_ids, write, length)
        memory = self._check(memory, input_ids.shape[0])
        traveller = GenerationMemory(
            memory,
            mask.bool(),
            segment_ids if self.config.strategy == "ssw" else None,
            write,
            start,
            self._end_ids(kwargs),
        )
        attach_to_cache(cache, traveller)
        out = self.base_model.generate(input_ids, attention_mask=mask, past_key_values=cache, **kwargs)
        if isinstance(out, Tensor):
            return out
        if getattr(out, "beam_indices", None) is None:
            out.memory = traveller.memory()
        elif write:
            if start:
                raise DeltaMemError("beams from a filled cache: the memory of the sequence returned can't be recovered")
            out.memory = self._replay(out.sequences, mask, memory, segment_ids, traveller.end_ids)
        else:
            out.memory = memory.select(torch.arange(len(out.sequences)) // (len(out.sequences) // len(input_ids)))
        return out

    @torch.no_grad()
    def _replay(self, sequences, mask, memory, segment_ids, end_ids) -> DeltaMemory:
        """The memory of finished beams. Beam search ends with a cache of the beams it would have gone on with, which
        need not be the sequences it returns, so those are fed once more: the prompt, then what was generated."""
        repeats, prompt = len(sequences) // len(mask), mask.shape[1]
        rows = torch.arange(len(sequences), device=mask.device) // repeats
        mask, memory = mask[rows], memory.select(rows.to(memory.device))
        fed = sequences[:, :-1]
        alive = (~torch.isin(fed[:, prompt:], end_ids)).long().cumprod(1)
        mask = torch.cat([mask, alive.to(mask.dtype)], 1)
        out = self(
            fed[:, :prompt],
            attention_mask=mask[:, :prompt],
            memory=memory,
            segment_ids=None if segment_ids is None else segment_ids[rows],
            use_cache=True,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :prompt],
            logits_to_keep=1,
        )
        for t in range(prompt, fed.shape[1]):
            out = self(
                fed[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                memory=out.memory,
                past_key_values=out.past_key_values,
                position_ids=(mask[:, : t + 1].sum(1, keepdim=True) - 1).clamp_min(0),
                use_cache=True,
            )
        return out.memory

    def new_memory(self, batch_size: int) -> DeltaMemory:
        """An empty memory: zero states [batch_size, N, r, r], float32, on the backbone's device."""
        shape = (batch_size, self.config.num_states, self.config.rank, self.config.rank)
        return DeltaMemory({int(i): torch.zeros(shape, device=layer.in_proj.device) for i, layer in self._layers()})

    # --- files and manners ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, base_model: PreTrainedModel, path: str | Path, is_trainable: bool = False
    ) -> DeltaMemModel:
        """Load an adapter onto a backbone.

        Args:
            path: a folder (this project's or the public release's format), a Hub id, or ``models:/name@alias`` or
                ``models:/name/version`` of an MLflow registry.
            is_trainable: keep the adapter in float32 and trainable; otherwise it takes the backbone's dtype.

        Raises:
            AdapterFormatError: the folder is malformed or doesn't fit the backbone; the message names the tensor.
        """
        config, tensors = load_adapter(locate(path))
        model = cls(base_model, config)
        fill_layers(model.memory_layers, tensors, config, str(path))
        if not is_trainable:
            model.requires_grad_(False).eval()
            for _, layer in model._layers():
                layer.in_proj.data = layer.in_proj.data.to(base_model.dtype)
                layer.steer.to(base_model.dtype)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card; never the backbone."""
        tensors = collect_tensors(self.memory_layers.state_dict(), self.config)
        save_adapter(Path(path), self.config, tensors)

    def print_trainable_parameters(self) -> None:
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the frozen backbone."""
        before, self._adapter_disabled = self._adapter_disabled, True
        try:
            yield
        finally:
            self._adapter_disabled = before

    def unload(self) -> PreTrainedModel:
        """Take the adapter off; returns the backbone as it was (still frozen)."""
        for hook in self._hooks:
            hook.remove()
        return self.base_model

    def merge_and_unload(self) -> None:
        raise DeltaMemError(
            "a δ-mem adapter can't be merged: what it adds to a projection depends on the memory, which changes with "
            "every token, so there is no fixed weight to add; keep the adapter beside the backbone"
        )

    def gradient_checkpointing_enable(self, selective: bool = False) -> None:
        """Recompute activations in the backward pass; takes effect in training mode.

        Args:
            selective: keep the results of matrix products and attention and recompute only what lies between them;
                False keeps one tensor per layer.
        """
        options: dict[str, Any] = {"use_reentrant": False}
        if selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    @property
    def device(self) -> torch.device:
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.dtype

    # --- checks -----------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[tuple[str, DeltaMemLayer]]:
        return iter(self.memory_layers.items())

    def _no_cache(self) -> NoCache | None:
        (block,) = self._first_block
        checkpointing = block.training and getattr(block, "gradient_checkpointing", False)
        return None if checkpointing else NoCache()  # layers that run twice warn of any cache

    def delta_call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        memory: DeltaMemory | None,
        write: bool,
        segment_ids: Tensor | None,
    ) -> DeltaCall:
        """What the backbone takes as its keyword argument ``delta_call`` for one pass.

        For whoever runs a twin of the backbone itself (:mod:`deltamem.decoding`); arguments and errors as in
        :meth:`forward`. :meth:`memory_after` has what the pass leaves.
        """
        batch, length = input_ids.shape
        valid = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
                raise DeltaMemError(
                    f"attention_mask must be the 2-D padding mask [B, T] or [B, past + T] of input_ids "
                    f"{tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
                )
            valid = attention_mask[:, -length:].bool()
        self._need_segments(segment_ids, write, length)
        segments = None
        if segment_ids is not None and write and self.config.strategy == "ssw":
            if segment_ids.shape != input_ids.shape:
                raise SegmentsMissingError(
                    f"segment_ids must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(segment_ids.shape)}"
                )
            segments = rank_segments(segment_ids, valid, input_ids.device)
        return DeltaCall(dict(self._check(memory, batch).states), valid, segments, write)

    def _need_segments(self, segment_ids: Tensor | None, write: bool, length: int) -> None:
        if self.config.strategy == "ssw" and write and segment_ids is None and length > 1:
            raise SegmentsMissingError(
                "ssw writes one mean per segment and was not told where segments begin and end: pass segment_ids "
                "[B, T] (deltamem.encode_messages derives them from a chat template), or write=False to read only"
            )

    def _check(self, memory: DeltaMemory | None, batch: int) -> DeltaMemory:
        if memory is None:
            return self.new_memory(batch)
        layers = {int(i) for i in self.memory_layers}
        if set(memory.states) != layers:
            raise MemoryMismatchError(
                f"the memory has states for layers {sorted(memory.states)}, the adapter for {sorted(layers)}"
            )
        expected = (batch, self.config.num_states, self.config.rank, self.config.rank)
        shape = tuple(next(iter(memory.states.values())).shape)
        if shape != expected:
            raise MemoryMismatchError(f"the memory's states are {shape}, this adapter and batch need {expected}")
        return memory

    def memory_after(self, call: DeltaCall, memory: DeltaMemory | None) -> DeltaMemory:
        """The memory that a pass with ``call`` has left, with the metadata of the one it began with.

        Raises:
            DeltaMemError: the backbone kept the call from its attention layers.
        """
        if not call.memory_out:
            raise DeltaMemError(
                f"{type(self.base_model).__name__} did not hand its keyword arguments down to its attention layers, so "
                "no memory was read or written; this transformers version or model is not supported"
            )
        return DeltaMemory(dict(sorted(call.memory_out.items())), memory.metadata if memory else {})

    def _end_ids(self, options: dict) -> Tensor:
        config = options.get("generation_config") or self.base_model.generation_config
        ids: list[int] = []
        for name in ("eos_token_id", "pad_token_id"):
            value = options.get(name, getattr(config, name, None))
            ids += value if isinstance(value, list | tuple) else [value] if value is not None else []
        return torch.tensor(ids, dtype=torch.long, device=self.device)


def get_delta_mem_model(base_model: PreTrainedModel, config: DeltaMemConfig | None = None) -> DeltaMemModel:
    """Put a new, trainable adapter on a backbone, which is frozen.

    Raises:
        UnsupportedModelError: the backbone's attention layers can't be found.
    """
    config = config or DeltaMemConfig()
    if config.base_model_name_or_path is None:
        name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
        config = replace(config, base_model_name_or_path=name or None)
    return DeltaMemModel(base_model, config)


def backbone_of(model: DeltaMemModel | PreTrainedModel) -> PreTrainedModel:
    """The language model itself, of one with a memory or of a bare one."""
    return model.base_model if isinstance(model, DeltaMemModel) else model


def segment_of(model: DeltaMemModel | PreTrainedModel) -> Literal["message", "sentence"]:
    """What segments its prompts are encoded with; a bare backbone's are of no consequence."""
    return model.config.segment if isinstance(model, DeltaMemModel) else "message"
