"""What a step's layers need to know of the sequences in it: their pages, and which tokens are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder

from deltamem_kernels.paged import PaddedRows
from deltamem_vllm.names import BACKEND
from deltamem_vllm.page import adapter_numbers, first_written, strengths


@dataclass
class MemoryMetadata(BaseMambaAttentionMetadata):
    """vLLM's own, and what is the same in every layer of a step.

    vLLM puts sequences that decode one token first, then those that read a prompt.

    Attributes:
        rows: the prompts' tokens as rows.
        positions_p: [prompt tokens], each token's place in its sequence.
        choice: found out by the step's first layer; see :meth:`choices`.
    """

    rows: PaddedRows | None = None
    positions_p: Tensor | None = None
    choice: Choices | None = None

    def choices(self, pages: Tensor) -> Choices:
        """What a page says of its sequence's tokens; it stands in every layer's page, so one is read."""
        if self.choice is None:
            self.choice = Choices(self, pages)
        return self.choice


class Choices:
    """Tokens' pages, whether they are written, how strongly they steer, and by which adapter.

    Attributes:
        page_d, page_p: [sequences] int64, of those that decode and of those that read a prompt; None: there are none.
        writes_d, writes_p: [tokens] bool; None: all.
        strength: [tokens, 1] float32; None: all steer as trained.
        adapter: [tokens] int64, its number.
    """

    def __init__(self, metadata: MemoryMetadata, pages: Tensor):
        self.page_d = self.page_p = self.writes_d = self.writes_p = None
        pages_of_tokens = []
        if metadata.state_indices_tensor_d is not None and metadata.num_decodes:
            self.page_d = metadata.state_indices_tensor_d[:, 0].long()
            own = pages.index_select(0, self.page_d)
            self.writes_d = metadata.seq_lens[: len(own)] - 1 >= first_written(own)
            pages_of_tokens.append(own)
        if metadata.rows is not None:
            assert metadata.state_indices_tensor_p is not None
            self.page_p = metadata.state_indices_tensor_p.long()
            own = pages.index_select(0, self.page_p)
            of_token = metadata.rows.repeat(own)
            self.writes_p = metadata.positions_p >= first_written(of_token)
            pages_of_tokens.append(of_token)
        own = torch.cat(pages_of_tokens)
        self.strength: Tensor | None = strengths(own).unsqueeze(1)
        self.adapter = adapter_numbers(own).long()
        if not pages.is_cuda:  # where a look at the values waits for nothing, most steps need neither
            self.writes_d, self.writes_p = (None if _all(w) else w for w in (self.writes_d, self.writes_p))
            self.strength = None if _all(self.strength == 1) else self.strength


def _all(flags: Tensor | None) -> bool:
    return flags is None or bool(flags.all())


class MemoryMetadataBuilder(BaseMambaAttentionMetadataBuilder[MemoryMetadata]):
    """Adds the prompts' rows and positions to what vLLM's builder finds."""

    metadata_cls = MemoryMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table: ClassVar[bool] = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **more: Any,
    ) -> MemoryMetadata:
        """One step's metadata."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **more)
        if metadata.num_prefills:
            starts = common_attn_metadata.query_start_loc_cpu[-metadata.num_prefills - 1 :]
            lengths = starts.diff()
            ends = common_attn_metadata.seq_lens[metadata.num_reqs - metadata.num_prefills : metadata.num_reqs]
            rows = metadata.rows = PaddedRows(lengths.tolist(), ends.device)
            first = ends - lengths.to(ends.device, non_blocking=True)
            offset = torch.arange(rows.longest, device=ends.device)
            metadata.positions_p = rows.unpad((first.unsqueeze(1) + offset).unsqueeze(-1)).squeeze(-1)
        return metadata


class MemoryBackend(AttentionBackend):
    """By which vLLM finds the builder."""

    @staticmethod
    def get_name() -> str:
        """vLLM's name for it."""
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type[MemoryMetadataBuilder]:
        """Who makes the metadata."""
        return MemoryMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """A state per sequence, no keys and values."""
        return True
