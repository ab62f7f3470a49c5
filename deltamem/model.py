"""A frozen language model with a memory."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.adapters.locate import locate
from deltamem.adapters.publish import publish
from deltamem.adapters.tensors import collect_tensors, fill_layers
from deltamem.backbone.acceleration import keep_products
from deltamem.backbone.calls import (
    cache_length,
    check_cache,
    check_memory,
    check_positions,
    check_prompt,
    check_segments,
    check_tokens,
    checked_strength,
    need_segments,
    valid_tokens,
)
from deltamem.backbone.decoder import check_gradients, find_decoder
from deltamem.backbone.generation import rows_of, run_generate
from deltamem.backbone.generation_memory import GenerationMemory, insert_call
from deltamem.backbone.generation_options import GenerationOptions
from deltamem.backbone.no_cache import NoCache
from deltamem.backbone.row_ends import watch_ends
from deltamem.backbone.steering import DeltaCall, attach, write_trunk
from deltamem.config import DeltaMemConfig, SegmentRule
from deltamem.errors import AdapterFormatError, ConfigError, DeltaMemError
from deltamem.layer import DeltaMemLayer, MemoryLayers, mean_gates
from deltamem.memory import DeltaMemory
from deltamem.segments import rank_segments


@dataclass
class DeltaMemOutput(CausalLMOutputWithPast):
    """transformers' own output, and the memory after the pass.

    Attributes:
        loss: mean cross-entropy of the labels in nats per token, a scalar; None without labels.
        logits: [B, T, vocabulary] in the backbone's dtype; fewer tokens with ``logits_to_keep``.
        memory: of the same batch; with ``write=False`` as it came.
    """

    memory: DeltaMemory | None = None


class DeltaMemModel(nn.Module):
    """A causal language model, frozen, whose attention layers read and write a :class:`DeltaMemory`.

    Made by :func:`get_delta_mem_model` or :meth:`from_pretrained`. Nothing about a sequence is kept on the module:
    a memory goes in, a new one comes out. Several adapters may sit on one backbone, each in a model of its own: a call
    of one doesn't touch the others. What happens to a token is the paper's Method, steps 1 to 5
    (:mod:`deltamem.layer`).

    Attributes:
        strength: how strongly what is read steers: 1 as trained, 0 exactly the frozen model. A call may say otherwise.

    Raises:
        UnsupportedModelError: the backbone's attention layers can't be found.
        ConfigError: the configuration names a layer that the backbone doesn't have.
    """

    def __init__(self, base_model: PreTrainedModel, config: DeltaMemConfig):
        super().__init__()
        decoder = find_decoder(base_model)
        depth = len(decoder.layers)
        indices = range(depth) if config.layers is None else config.layers
        if max(indices) >= depth:
            raise ConfigError(f"layers names layer {max(indices)}, but the backbone has layers 0 to {depth - 1}")
        base_model.requires_grad_(False)
        self.base_model, self.config, self.strength = base_model, config, 1.0
        self.memory_layers = MemoryLayers(
            {
                str(i): DeltaMemLayer(
                    config,
                    decoder.hidden_size,
                    {
                        head: decoder.layers[i].projections[head].columns(config.rank, base_model.dtype)
                        for head in config.steer
                    },
                )
                for i in indices
            }
        )
        self._decoder = decoder
        self._hooks = attach(decoder, self.memory_layers)
        self._hooks.append(base_model.register_forward_pre_hook(insert_call, with_kwargs=True))
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
        strength: float | None = None,
        **kwargs: Any,
    ) -> DeltaMemOutput:
        """Read, then (if asked) write, as the tokens pass.

        Args:
            input_ids: [B, T] int.
            attention_mask: [B, T] int or bool, or [B, past + T] with a KV cache; 0 marks padding. None: every token
                counts.
            memory: None means a new, empty one. It is not changed.
            write: False reads only, and returns the memory as it came.
            segment_ids: [B, T] int for ssw; equal numbers make one segment, -1 is not written. On the CPU their number
                is known at once, which makes the write cheaper on a GPU too.
            labels: [B, T] int as transformers takes them (-100 is ignored).
            right_padded: your word that in every row the padding comes after the tokens. Causal attention then needs no
                mask, only the memory does, and the host never waits for the device. Not with a KV cache.
            strength: of this call; None: the model's.
            **kwargs: what the backbone's forward takes (past_key_values, use_cache, logits_to_keep, …).

        Raises:
            SegmentsMissingError: ssw is to write several tokens and doesn't know the segments.
            MemoryMismatchError: the memory isn't this adapter's or this batch's.
            DeltaMemError: tokens, mask, positions or cache that can't be meant.
        """
        past = cache_length(kwargs.get("past_key_values"))
        call = self.delta_call(input_ids, attention_mask, memory, write, segment_ids, strength, past)
        if call is None:
            out = self.base_model(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            return DeltaMemOutput(**out, memory=self._check(memory, len(input_ids)))
        check_positions(kwargs, call.valid)
        check_cache(self.base_model.config, past or 0, input_ids.shape[1])
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
        strength: float | None = None,
    ) -> DeltaMemory:
        """Write tokens into a memory; computes no logits and nothing after the last layer's memory.

        The tokens steer each other by what they read, as in a whole pass. Arguments and errors as in :meth:`forward`.
        """
        call = self.delta_call(input_ids, attention_mask, memory, True, segment_ids, strength)
        if call is None:
            return self._check(memory, len(input_ids))
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

        Raises:
            DeltaMemError: the adapter is disabled, so that nothing is written.
        """
        call = self.delta_call(input_ids, attention_mask, memory, True, segment_ids)
        if call is None:
            raise DeltaMemError("inside disable_adapter() nothing is written, so there are no gates")
        call.written = {}
        self._write(call, input_ids, attention_mask, right_padded)
        biases = [self.memory_layers[str(i)].beta_bias for i in call.written]
        return self.memory_after(call, memory), mean_gates(biases, list(call.written.values()))

    def _write(self, call: DeltaCall, input_ids: Tensor, attention_mask: Tensor | None, right_padded: bool) -> None:
        write_trunk(self._decoder, self.memory_layers)(
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
        strength: float | None = None,
        **kwargs: Any,
    ):
        """transformers' own ``generate`` (greedy, sampling, beams, any cache), reading and writing a memory.

        The prompt is read and written like in :meth:`forward`, each generated token as it is fed back; under ssw
        that makes each generated token a segment of its own. The last token generated is not fed, so not written; nor
        is one that ended its row, whatever ended it (an end token, a stop string, a stopping criterion), nor what
        transformers feeds that row after it while others go on.

        Returns:
            What transformers returns: [B · num_return_sequences, T + new tokens] int, or, with
            ``return_dict_in_generate=True``, its output, which has ``.memory`` too, one row per sequence returned.

        Args:
            input_ids: [B, T] int, the whole prompt. With a filled cache those of its tokens too, or, if
                ``attention_mask`` covers them, the new ones alone.
            segment_ids: of all tokens that the mask covers.

        Other arguments as in :meth:`forward`.

        Raises:
            DeltaMemError: an option that rolls the cache back (assisted decoding), or that does without a cache.
        """
        check_tokens(input_ids)
        memory, cache = self._check(memory, len(input_ids)), kwargs.get("past_key_values")
        if self.adapter_disabled:
            out = cast(Any, self.base_model).generate(input_ids, attention_mask=attention_mask, **kwargs)
            if not isinstance(out, Tensor):
                out.memory = memory.select(rows_of(out.sequences, len(input_ids)).to(memory.device))
            return out
        by_segment, options = self.config.strategy == "ssw", GenerationOptions(self.base_model, kwargs)
        options.check(by_segment and write)
        start = 0 if cache is None or cache_length(cache) == 0 else int(cache.get_seq_length())
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_prompt(input_ids, mask, start)
        check_cache(self.base_model.config, start, mask.shape[1] - start)
        check_positions(kwargs, mask.bool())
        need_segments(self.config, segment_ids, write, mask.shape[1] - start)
        if by_segment and segment_ids is not None:
            check_segments(segment_ids, tuple(mask.shape))
        ends = watch_ends(options)
        options.keep_eager()
        traveller = GenerationMemory(
            self.memory_layers,
            memory,
            mask.bool(),
            segment_ids if by_segment else None,
            write,
            self._strength(strength),
            start,
            ends,
        )
        return run_generate(self.base_model, traveller, input_ids, mask, kwargs, partial(self, strength=strength))

    def new_memory(self, batch_size: int) -> DeltaMemory:
        """An empty memory, S_0 = 0: states [batch_size, N, r, r], float32, on the backbone's device.

        Raises:
            DeltaMemError: the batch has no rows.
        """
        if batch_size < 1:
            raise DeltaMemError(f"a memory is of at least one sequence, got batch_size={batch_size}")
        shape = (batch_size, self.config.states, self.config.rank, self.config.rank)
        layers = self.memory_layers.items()
        return DeltaMemory({int(i): torch.zeros(shape, device=layer.in_proj.device) for i, layer in layers})

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
            AdapterFormatError: there is no such adapter, or the folder is malformed or doesn't fit the backbone; the
                message names the tensor.
            ConfigError: the adapter has a layer that the backbone doesn't have.
            UnsupportedModelError: the backbone's attention layers can't be found, or it is to be trained, and the
                backbone's quantised layers pass no gradients.
        """
        config, tensors = load_adapter(locate(path))
        if is_trainable:
            check_gradients(base_model)
        model = cls(base_model, config)
        try:
            fill_layers(model.memory_layers, tensors, config, str(path))
        except AdapterFormatError:
            model.unload()
            raise
        if not is_trainable:
            model.requires_grad_(False).eval()
            for _, layer in model.memory_layers.items():
                layer.in_proj.data = layer.in_proj.data.to(base_model.dtype)
                layer.steer.to(base_model.dtype)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card; never the backbone.

        Raises:
            OSError: the folder can't be written.
        """
        tensors = collect_tensors(self.memory_layers.state_dict(), self.config)
        save_adapter(Path(path), self.config, tensors)

    def push_to_hub(self, repo: str, evaluations: Sequence[str | Path] = (), **options: Any) -> str:
        """Put the adapter on the Hugging Face Hub; returns its address.

        Arguments and errors as in :func:`deltamem.adapters.publish.publish`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return publish(Path(folder), repo, evaluations, **options)

    def can_generate(self) -> bool:
        """Asked by transformers' pipelines. They take the model; that its name isn't on their list, they only log."""
        return True

    @property
    def generation_config(self) -> GenerationConfig:
        """The backbone's; transformers' pipelines look for it."""
        return self.base_model.generation_config

    def print_trainable_parameters(self) -> None:
        """How many parameters are trained, and how many there are with the backbone's."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Inside, the model is the frozen backbone."""
        before, self._adapter_disabled = self._adapter_disabled, True
        try:
            yield
        finally:
            self._adapter_disabled = before

    def unload(self) -> PreTrainedModel:
        """Take the adapter off; returns the backbone as it was (still frozen). Others on it stay.

        The adapter can still be saved, no longer called.
        """
        while self._hooks:
            self._hooks.pop().remove()
        return self.base_model

    def merge_and_unload(self) -> None:
        """There for who knows PEFT's, and can't be done.

        Raises:
            DeltaMemError: always; it says why.
        """
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
        """The backbone's."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's, and of an adapter that isn't trained; states are float32 whatever it is."""
        return self.base_model.dtype

    # --- checks -----------------------------------------------------------------------------------------------

    def _no_cache(self) -> NoCache | None:
        block = self._decoder.layers[0].module
        checkpointing = block.training and getattr(block, "gradient_checkpointing", False)
        return None if checkpointing else NoCache()  # layers that run twice warn of any cache

    @property
    def adapter_disabled(self) -> bool:
        """Whether this is inside :meth:`disable_adapter`.

        Raises:
            DeltaMemError: the adapter was unloaded.
        """
        if not self._hooks:
            raise DeltaMemError(
                "this adapter was taken off its backbone by unload(); put it on again with "
                "DeltaMemModel.from_pretrained or get_delta_mem_model"
            )
        return self._adapter_disabled

    def _strength(self, strength: float | None) -> float:
        return checked_strength(self.strength if strength is None else strength)

    def delta_call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: DeltaMemory | None = None,
        write: bool = True,
        segment_ids: Tensor | None = None,
        strength: float | None = None,
        past: int | None = None,
    ) -> DeltaCall | None:
        """What the backbone takes as its keyword argument ``delta_call`` for one pass; None while disabled.

        For whoever runs a twin of the backbone itself (:mod:`deltamem.decoding`). :meth:`memory_after` has what the
        pass leaves.

        Args:
            past: tokens in the cache; None: unknown.

        Other arguments, and errors, as in :meth:`forward`.
        """
        check_tokens(input_ids)
        if self.adapter_disabled:
            return None
        batch, length = input_ids.shape
        valid = valid_tokens(attention_mask, input_ids, past)
        need_segments(self.config, segment_ids, write, length)
        segments = None
        if segment_ids is not None and write and self.config.strategy == "ssw":
            check_segments(segment_ids, tuple(input_ids.shape))
            segments = rank_segments(segment_ids, valid, input_ids.device)
        states = dict(self._check(memory, batch).states)
        return DeltaCall(self.memory_layers, states, valid, segments, write, self._strength(strength))

    def _check(self, memory: DeltaMemory | None, batch: int) -> DeltaMemory:
        if memory is None:
            return self.new_memory(batch)
        check_memory(memory, self.memory_layers, batch)
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


def get_delta_mem_model(base_model: PreTrainedModel, config: DeltaMemConfig | None = None) -> DeltaMemModel:
    """Put a new, trainable adapter on a backbone, which is frozen.

    Its parameters are float32, initialised as the paper does.

    Args:
        config: None: the paper's token-state write.

    Raises:
        UnsupportedModelError: the backbone's attention layers can't be found, or are quantised in a way that passes no
            gradients.
        ConfigError: the configuration names a layer that the backbone doesn't have.
    """
    config = config or DeltaMemConfig()
    if config.base_model_name_or_path is None:
        name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
        config = replace(config, base_model_name_or_path=name or None)
    check_gradients(base_model)
    return DeltaMemModel(base_model, config)


def backbone_of(model: DeltaMemModel | PreTrainedModel) -> PreTrainedModel:
    """The language model itself, of one with a memory or of a bare one."""
    return model.base_model if isinstance(model, DeltaMemModel) else model


def segment_of(model: DeltaMemModel | PreTrainedModel) -> SegmentRule | None:
    """What its prompts' segments are (ssw); None where it needs none."""
    ssw = isinstance(model, DeltaMemModel) and model.config.strategy == "ssw"
    return model.config.segment_rule if ssw else None
