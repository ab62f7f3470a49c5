"""One layer's memory: project, gate, read, write, steer (paper, Method, steps 1 to 5)."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem.config import DeltaMemConfig
from deltamem.segments import Segments, segment_means
from deltamem_kernels import delta_step, gated_read, steer_
from deltamem_kernels.limits import limited, limited_scan


class Written(NamedTuple):
    """What a pass wrote: logits of the gates [B, S, N·r] before the bias, and [B, S] bool, which of the S count."""

    gates: Tensor
    counts: Tensor | None


class DeltaMemLayer(nn.Module):
    """The trainable parameters of one attention layer, and the equations they take part in.

    Parameters:
        in_proj: [4·N·r, hidden], the rows of W_q, W_k, W_v and W_β, so that one matrix product serves all.
        beta_bias: [N·r].
        steer: {"q": [q_out, N·r], "k": [k_out, N·r], "v": [v_out, N·r], "o": [hidden, N·r]}, those steered.

    Attributes:
        norm_limit: [N] float32, the Frobenius norm that each state may reach; None: any. The paper's Method has no such
            limit; docs/remember.md has what it is for. A state beyond it is scaled down as a pass of several tokens
            begins, and in a longer one before every 256th write. Single tokens, as they are generated, leave it to the
            pass that follows.
    """

    def __init__(self, config: DeltaMemConfig, hidden: int, base_columns: dict[str, Tensor]):
        """Initialise as the paper does.

        Args:
            base_columns: [out, ≤ r], the first columns of the backbone's projection weights, of the steered heads.
        """
        super().__init__()
        self.num_states, self.rank, self.scale = config.states, config.rank, config.scale
        self.per_segment = config.strategy == "ssw"
        device = next(iter(base_columns.values())).device
        width = config.width
        self.in_proj = nn.Parameter(torch.zeros(4 * width, hidden, device=device))
        for block in self.in_proj.detach()[: 3 * width].split(width):  # W_β starts at zero
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.beta_bias = nn.Parameter(torch.full((width,), config.beta_bias_init, device=device))
        limits = torch.full((config.states,), torch.finfo(torch.float32).max, device=device)
        self.register_buffer("norm_limit", limits if config.limit_norms else None)
        self.norm_limit: Tensor | None
        self.steer = nn.ParameterDict(
            {head: nn.Parameter(_steering_init(columns, config)) for head, columns in base_columns.items()}
        )

    def project(self, x: Tensor) -> Tensor:
        """x [B, T, hidden] → q̃ | k̃ | ṽ | β̃, [B, T, 4·N·r], in x's dtype."""
        return F.linear(x, self.in_proj.to(x.dtype))

    def gates(self, projected: Tensor) -> Tensor:
        """β̃ of a projection, [B, T, N·r]."""
        return projected[..., 3 * self.num_states * self.rank :]

    def forward(
        self, projected: Tensor, state: Tensor, valid: Tensor | None, segments: Segments | None, write: bool
    ) -> tuple[Tensor, Tensor, Written | None]:
        """Reads for every token, the state after the pass, and what was written.

        Args:
            projected: [B, T, 4·N·r] from :meth:`project`.
            state: [B, N, r, r] float32.
            valid: [B, T] bool or None; padding reads zero and writes nothing.
            segments: the segments to write (ssw with more than one token), else None: write token by token.
            write: False reads only.

        Returns:
            reads [B, T, N·r] float32, new state, what was written (None without ``write``).
        """
        if not write:
            return gated_read(projected, limited(state, self.norm_limit), valid).flatten(2), state, None
        if segments is None:
            reads, state = limited_scan(projected, self.beta_bias, state, valid, self.norm_limit)
            return reads.flatten(2), state, Written(self.gates(projected), valid)
        reads = gated_read(projected, limited(state, self.norm_limit), valid)
        means, filled = segment_means(projected, segments)
        _, state = limited_scan(means, self.beta_bias, state, filled, self.norm_limit)
        return reads.flatten(2), state, Written(self.gates(means), filled)

    def step(
        self, x: Tensor, state: Tensor, valid: Tensor | None, out_state: Tensor | None, writes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`project` and :meth:`forward` of one token in one kernel, without gradients.

        Args:
            x: [B, 1, hidden].
            valid: [B] bool or None.
            out_state: where the new state goes; None makes a new tensor.
            writes: [B] bool or None, the sequences that write.
        """
        reads, state = delta_step(x[:, 0], self.in_proj, self.beta_bias, state, valid, out_state, writes)
        return reads.flatten(1).unsqueeze(1), state

    def scaled(self, reads: Tensor, dtype: torch.dtype) -> Tensor:
        """What :meth:`steered` takes with gradients: (α/r) · reads in the backbone's dtype."""
        return (reads * self.scale).to(dtype)

    def steered(self, head: str, output: Tensor, reads: Tensor) -> Tensor:
        """output + (α/r) · reads · W_Δᵀ (step 4).

        Without gradients the sum is accumulated into ``output`` itself, which saves a copy of the projection. With
        gradients it is a new tensor, because activation checkpointing may keep the projection's own result; and the
        reads are ``scaled`` already, once for all heads.

        Args:
            output: [B, T, out], the frozen projection's result (or a slice of a packed one).
            reads: [B, T, N·r].
        """
        weight = self.steer[head]
        if torch.is_grad_enabled() and torch.compiler.is_compiling():
            added = F.linear(reads, weight.to(output.dtype))  # a sum of its own becomes part of what comes next
            return (output.float() + added.float()).to(output.dtype)
        flat, reads = output.view(-1, output.shape[-1]), reads.flatten(0, 1)
        if torch.is_grad_enabled():
            return torch.addmm(flat, reads, weight.to(output.dtype).t()).view_as(output)
        if output.shape[1] == 1:
            steer_(flat, reads, weight, self.scale)
        else:
            flat.addmm_(reads.to(output.dtype), weight.to(output.dtype).t(), alpha=self.scale)
        return output


class MemoryLayers(nn.ModuleDict):
    """An adapter's layers by their numbers as text."""

    def __getitem__(self, key: str) -> DeltaMemLayer:
        return cast(DeltaMemLayer, super().__getitem__(key))

    def items(self) -> ItemsView[str, DeltaMemLayer]:
        return cast("ItemsView[str, DeltaMemLayer]", super().items())

    @property
    def limited(self) -> bool:
        """Whether the norms of the states have limits."""
        return any(layer.norm_limit is not None for _, layer in self.items())


def mean_gates(biases: Sequence[Tensor], written: Sequence[Written]) -> Tensor:
    """Mean write gate β of every layer over what it wrote, [layers]; all layers in one go, because it is small work.

    Args:
        biases: b_β of each layer, [N·r].
    """
    bias = torch.stack(list(biases)).float()[:, None, None]
    beta = torch.sigmoid(torch.stack([w.gates for w in written]).float() + bias).mean(-1)
    counts = written[0].counts  # padding and segments are the same in every layer
    if counts is None:
        return beta.mean((1, 2))
    return (beta * counts).sum((1, 2)) / counts.sum().clamp_min(1)


def _steering_init(base_columns: Tensor, config: DeltaMemConfig) -> Tensor:
    """[out, N·r]; "base_slice": the projection's first r columns, normalised and scaled, the rest zero."""
    columns = torch.zeros(base_columns.shape[0], config.width, device=base_columns.device)
    if config.output_init == "zero":
        return columns
    if config.output_init == "random":
        directions = torch.randn_like(columns)
    else:
        directions = base_columns
    columns[:, : directions.shape[1]] = config.online_gain * F.normalize(directions, dim=0)
    return columns
