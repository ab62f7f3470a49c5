"""MLP Memory (arXiv 2508.01832): a network without attention that says what a retriever would, from one hidden state.

It is a stack of the backbone's own kind of feed-forward block, reads what the backbone's last one reads, and has a head
of its own. At decoding the two distributions are mixed: log((1 − λ) p_backbone + λ p_network).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deltamem.backbone.decoder import find_decoder


class Block(nn.Module):
    """x + down(silu(gate(n)) · up(n)), where n is x after an RMS norm."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class MlpMemory(nn.Module):
    """From the input of the backbone's last feed-forward network, [..., h], to logits [..., V] of the next token."""

    def __init__(self, config: PreTrainedConfig, depth: int | None):
        super().__init__()
        text = config.get_text_config(decoder=True)
        hidden, inner = text.hidden_size, text.intermediate_size
        self.blocks = nn.Sequential(*(Block(hidden, inner) for _ in range(depth or text.num_hidden_layers)))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, text.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, text.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x.to(self.head.weight.dtype))))


def on_last_input(base: PreTrainedModel, use: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """Has what the last layer's feed-forward network reads, [B, T, h], given to a function in each pass."""

    def seen(module: nn.Module, args: tuple) -> None:
        use(args[0])

    return find_decoder(base).layers[-1].module.get_submodule("mlp").register_forward_pre_hook(seen)


def mix_into(base: PreTrainedModel, network: MlpMemory, weight: float) -> PreTrainedModel:
    """The backbone, whose logits from now on are the logarithms of the mixed distribution."""
    read: list[Tensor] = []

    def mixed(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        # taken out at once: nothing of a sequence outlives its pass. The head may read the last places alone.
        network_logits = network(read.pop()[:, -logits.shape[1] :])
        read.clear()
        own = logits.float().log_softmax(-1) + math.log1p(-weight)
        return torch.logaddexp(own, network_logits.float().log_softmax(-1) + math.log(weight))

    on_last_input(base, read.append)
    base.get_output_embeddings().register_forward_hook(mixed)
    return base
