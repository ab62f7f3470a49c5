"""The recurrence over states that lie in the pages of an engine's cache: many sequences, each at its own page.

Inference only. Pages are changed in place; a page is taken by one sequence at a time.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from deltamem_kernels.device import fits_triton
from deltamem_kernels.scan import gated_delta_scan

if NUMBA := find_spec("numba") is not None:  # it comes with vLLM; imported now, so that no request waits for it
    from deltamem_kernels.numba_paged import numba_paged_step

SHUT = float("-inf")
"""A gate's logit that writes nothing."""
TINY = 1e-12  # as F.normalize has it


def paged_step(
    projected: Tensor, beta_bias: Tensor, pages: Tensor, page: Tensor, writes: Tensor | None, reads: Tensor
) -> None:
    """One token of each of B sequences: read before write.

    Args:
        projected: [B, 4·N·r], the blocks q | k | v | β before they are normalised and gated.
        beta_bias: [N·r].
        pages: [P, N, r, r] float32, rows may lie apart; changed in place.
        page: [B] int, each sequence's.
        writes: [B] bool or None; where False the state is read and stays.
        reads: [B, N·r] float32, the result.
    """
    if fits_triton(pages):
        from deltamem_kernels.triton_paged import triton_paged_step

        triton_paged_step(projected, beta_bias, pages, page, writes, reads)
    elif NUMBA and pages.is_cpu:
        numba_paged_step(projected, beta_bias, pages, page, writes, reads)
    else:
        torch_paged_step(projected, beta_bias, pages, page, writes, reads)


def torch_paged_step(
    projected: Tensor, beta_bias: Tensor, pages: Tensor, page: Tensor, writes: Tensor | None, reads: Tensor
) -> None:
    """Same function as :func:`paged_step`, in PyTorch's operations: few, because it is their number that takes time."""
    _, states, rank, _ = pages.shape
    before = pages.index_select(0, page)
    parts = projected.float().view(-1, 4, states, rank)
    unit = parts[:, :2].tanh()
    unit.div_(torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min_(TINY))
    # of q the read, of k what the state predicts for it
    seen = torch.bmm(before.view(-1, rank, rank), unit.permute(0, 2, 3, 1).reshape(-1, rank, 2))
    seen = seen.view(-1, states, rank, 2)
    reads.view(-1, states, rank).copy_(seen[..., 0])
    beta = torch.add(parts[:, 3], beta_bias.view(states, rank)).sigmoid_()
    if writes is not None:
        beta.mul_(writes.view(-1, 1, 1))
    wanted = (parts[:, 2] - seen[..., 1]).unsqueeze(-1) * unit[:, 1].unsqueeze(-2)
    pages.index_copy_(0, page, before.lerp_(wanted, beta.unsqueeze(-1)))


def paged_scan(
    projected: Tensor,
    beta_bias: Tensor,
    pages: Tensor,
    page: Tensor,
    rows: PaddedRows,
    writes: Tensor | None,
    reads: Tensor,
) -> None:
    """All tokens of S sequences of unequal lengths, one after the other in ``projected``.

    Args:
        projected: [T, 4·N·r].
        page: [S] int, each sequence's.
        rows: where each sequence's tokens lie.
        writes: [T] bool or None; a token where it is False is read and not written.
        reads: [T, N·r] float32, the result.

    Other arguments as in :func:`paged_step`.
    """
    if writes is not None:
        projected = projected.clone()
        projected[:, 3 * beta_bias.numel() :].masked_fill_(~writes.unsqueeze(-1), SHUT)
    found, after = gated_delta_scan(rows.pad(projected), beta_bias, pages.index_select(0, page), rows.valid)
    reads.copy_(rows.unpad(found.flatten(2)))
    pages.index_copy_(0, page, after)


class PaddedRows:
    """Sequences of unequal lengths as the padded rows of a batch, and back.

    Args:
        lengths: of the S sequences, in order.
        device: of the tokens.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.longest = max(lengths)
        self.valid: Tensor | None = None  # [S, longest] bool; None: nothing is padded
        if min(lengths) < self.longest:
            counts = torch.tensor(lengths).unsqueeze(1)
            self.valid = (torch.arange(self.longest) < counts).to(device)

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, C] → [S, longest, C], zero where padded."""
        if self.valid is None:
            return tokens.view(-1, self.longest, tokens.shape[-1])
        padded = tokens.new_zeros(*self.valid.shape, tokens.shape[-1])
        padded[self.valid] = tokens
        return padded

    def unpad(self, rows: Tensor) -> Tensor:
        """[S, longest, C] → [T, C]."""
        return rows.flatten(0, 1) if self.valid is None else rows[self.valid]

    def repeat(self, rows: Tensor) -> Tensor:
        """[S, C], something of each sequence → [T, C], of each token."""
        return self.unpad(rows.unsqueeze(1).expand(-1, self.longest, -1))
