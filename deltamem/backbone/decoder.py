"""Where a Hugging Face decoder keeps what the memory needs: its layers, their attention, its projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem.errors import UnsupportedModelError

RECURRENT = {"hybrid", "hybrid_sliding", "linear_attention", "conv", "mamba", "recurrent"}
"""Layer types of transformers' configurations that pass more on to the next token than keys and values."""


@dataclass(frozen=True)
class Projection:
    """A (slice of a) linear layer whose output is steered: features start:stop of it."""

    module: nn.Linear  # or what quantisation has put in its place
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether all of the layer's output is steered."""
        return self.start == 0 and self.stop == _out_features(self.module)

    def columns(self, count: int, dtype: torch.dtype) -> Tensor:
        """[stop - start, count] float32: the weight's first columns (all, if it has fewer).

        Of a quantised layer, whose weight is packed, they are what the layer makes of unit vectors.

        Args:
            dtype: of the layer's input.
        """
        if not self.quantised:
            return self.module.weight.detach()[self.start : self.stop, :count].float()
        return self._probed(min(count, self.module.in_features), dtype)

    @property
    def quantised(self) -> bool:
        """Whether the layer's weight is packed."""
        weight = self.module.weight
        return type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point()

    def passes_gradients(self, dtype: torch.dtype) -> bool:
        """Whether its output has a gradient with respect to its input, as some quantised layers' has not."""
        if not self.quantised:
            return True
        x = torch.zeros(1, self.module.in_features, dtype=dtype, device=self.module.weight.device)
        with torch.enable_grad():
            return self.module(x.requires_grad_()).requires_grad

    @torch.no_grad()
    def _probed(self, count: int, dtype: torch.dtype) -> Tensor:
        units = torch.eye(count, self.module.in_features, dtype=dtype, device=self.module.weight.device)
        bias = self.module(torch.zeros_like(units[:1]))
        return (self.module(units) - bias)[:, self.start : self.stop].float().t().contiguous()


@dataclass(frozen=True)
class DecoderLayer:
    """One attention layer of the backbone; the names are those of Hugging Face's decoders."""

    module: nn.Module
    attention: nn.Module
    input_norm: nn.Module
    projections: dict[str, Projection]


@dataclass(frozen=True)
class Decoder:
    """The backbone's trunk (embeddings, layers, final norm; no head) and its layers."""

    trunk: nn.Module
    layers: list[DecoderLayer]
    hidden_size: int


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Find the attention layers of a causal language model.

    Raises:
        UnsupportedModelError: something is missing; the message says what and where.
    """
    name = type(model).__name__
    if not callable(getattr(model, "get_decoder", None)):
        raise UnsupportedModelError(
            f"{name} has no get_decoder(): δ-mem needs a Hugging Face decoder-only language model "
            "(AutoModelForCausalLM)"
        )
    types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if recurrent := sorted(types & RECURRENT):
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(recurrent)}, which keep a state of their own beside keys and "
            "values; only backbones that are attention throughout are supported"
        )
    trunk = model.get_decoder()
    blocks = getattr(trunk, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModelError(f"{name}: {type(trunk).__name__} has no list of decoder layers named 'layers'")
    layers = [_find_layer(block, f"{name}.layers[{i}]") for i, block in enumerate(blocks)]
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return Decoder(trunk, layers, hidden)


def check_gradients(model: PreTrainedModel) -> None:
    """A causal language model lets gradients through, so that an adapter on it can be trained.

    Raises:
        UnsupportedModelError: it is quantised in a way that doesn't.
    """
    for projection in find_decoder(model).layers[-1].projections.values():
        if not projection.passes_gradients(model.dtype):
            raise UnsupportedModelError(
                f"the backbone's quantised layers ({type(projection.module.weight).__name__}) pass no gradients, so an "
                "adapter can't be trained on it; quantise the weights only, not the activations"
            )


def _find_layer(block: nn.Module, where: str) -> DecoderLayer:
    attention = _need(block, where, "attention", "self_attn")
    where_attention = f"{where}.self_attn"
    output = _need(attention, where_attention, "output projection", "o_proj", "dense")
    packed = getattr(attention, "qkv_proj", None)
    if packed is not None:
        projections = _split_packed(packed, attention, where_attention)
    else:
        projections = {
            head: _whole(_need(attention, where_attention, f"{head} projection", f"{head}_proj")) for head in "qkv"
        }
    projections["o"] = _whole(output)
    return DecoderLayer(block, attention, _need(block, where, "norm before attention", "input_layernorm"), projections)


def _need(module: nn.Module, where: str, what: str, *names: str) -> Any:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError(
        f"{where} ({type(module).__name__}) has no {what} (looked for {', '.join(names)}); "
        "this backbone's attention layers are not supported"
    )


def _whole(linear: nn.Linear) -> Projection:
    return Projection(linear, 0, _out_features(linear))


def _out_features(linear: nn.Linear) -> int:
    """Of a linear layer; a quantised one's weight is packed and has another shape."""
    return linear.out_features if hasattr(linear, "out_features") else linear.weight.shape[0]


def _split_packed(packed: nn.Linear, attention: Any, where: str) -> dict[str, Projection]:
    """Rows of a packed qkv projection: queries, then keys, then values (Phi-3)."""
    config = attention.config
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    rows = _out_features(packed)
    if q + 2 * kv != rows:
        raise UnsupportedModelError(
            f"{where}.qkv_proj has {rows} rows, expected {q} + 2·{kv} (queries, keys, values in this order)"
        )
    return {
        "q": Projection(packed, 0, q),
        "k": Projection(packed, q, q + kv),
        "v": Projection(packed, q + kv, rows),
    }
