"""Memories in and out of the engine, by vLLM's connector for keys and values.

The scheduler's side reads what a request says and tells the worker which pages to fill and which to keep. A request
whose pages are to be kept holds them for one more step. A preempted request begins again from the memory it came with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from deltamem.config import DeltaMemConfig
from deltamem.errors import DeltaMemError
from deltamem_vllm.adapters import adapters_of
from deltamem_vllm.handover import Handover
from deltamem_vllm.names import BACKEND
from deltamem_vllm.page import state_size

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = init_logger(__name__)
MOST_KEPT = 4096
"""Memories that wait to be taken; the oldest goes."""
Places = tuple[int, ...]
"""A sequence's page, one number per group of layers that vLLM keeps together."""


@dataclass
class Orders(KVConnectorMetadata):
    """What the worker is to do before a step.

    Attributes:
        fill: pages of sequences that begin.
        keep: (request, what it said, pages) of sequences that have ended.
    """

    fill: list[tuple[Places, Handover]] = field(default_factory=list)
    keep: list[tuple[str, Handover, Places]] = field(default_factory=list)


class DeltaMemConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides; vLLM makes one in the scheduler's process and one in the worker's."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config, role, kv_cache_config)
        self._adapters = adapters_of(vllm_config)
        self._groups = [
            (number, group)
            for number, group in enumerate(kv_cache_config.kv_cache_groups)
            if isinstance(group.kv_cache_spec, MambaSpec) and group.kv_cache_spec.mamba_type.name == BACKEND
        ]
        self._running: dict[str, Handover] = {}
        self._refused: dict[str, str] = {}
        self._orders = Orders()
        self._pages: list[list[tuple[int, Tensor]]] = []
        self._sent: set[str] = set()
        self.kept: dict[str, bytes] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """Preempted requests needn't be computed again for our sake."""
        return False

    # --- in the scheduler

    def on_new_request(self, request: Request) -> None:
        """Read what a request says. One that makes no sense is cut short, and its answer says why."""
        try:
            handover = Handover.parse(request.kv_transfer_params, self._adapters)
        except (DeltaMemError, TypeError) as error:
            log.warning("a request's memory is refused: %s", error)
            handover = Handover.parse(None, self._adapters)
            self._refused[request.request_id], request.max_tokens = str(error), 1
        self._running[request.request_id] = handover
        # the cache of beginnings must never hand out what was computed with another memory
        request.cache_salt = f"{handover.salt} {request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """We bring no keys and values."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to do."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Orders:
        """The orders of the next step."""
        orders, self._orders = self._orders, Orders()
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            if new.num_computed_tokens == 0:  # else a page comes from the cache of beginnings
                orders.fill.append((self._places(new.block_ids, scheduled[new.req_id]), self._running[new.req_id]))
        again = scheduler_output.scheduled_cached_reqs
        for name, blocks, computed in zip(again.req_ids, again.new_block_ids, again.num_computed_tokens, strict=True):
            if name in again.resumed_req_ids and computed == 0 and blocks is not None:
                orders.fill.append((self._places(blocks, scheduled[name]), self._running[name]))
        return orders

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Have the memory kept where that was asked for; the pages are free a step later."""
        handover = self._running.pop(request.request_id, None)
        refused = self._refused.pop(request.request_id, None)
        if refused is not None:
            return False, {"deltamem_error": refused}
        if handover is None or handover.keep is None or not request.num_computed_tokens:
            return False, None
        places = self._places(block_ids, request.num_computed_tokens)
        self._orders.keep.append((request.request_id, handover, places))
        return True, None

    def _places(self, block_ids: tuple[list[int], ...], tokens: int) -> Places:
        """Where the state after ``tokens`` tokens lies."""
        places = []
        for number, group in self._groups:
            spec, blocks = group.kv_cache_spec, block_ids[number]
            places.append(blocks[0] if spec.mamba_cache_mode == "none" else blocks[(tokens - 1) // spec.block_size])
        return tuple(places)

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Find the layers' pages, in the order of the layers within a memory."""
        layers = self._vllm_config.compilation_config.static_forward_context
        numbers = sorted(layers[name].number for _, group in self._groups for name in group.layer_names)
        self._pages = [
            [(numbers.index(layers[name].number), layers[name].kv_cache[0]) for name in group.layer_names]
            for _, group in self._groups
        ]

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Keep and fill, in this order, before the pass: ``start_load_kv`` may come after it."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Orders)
        for name, handover, places in connector_metadata.keep:
            assert handover.keep is not None and handover.adapter is not None
            self.kept[handover.keep] = self._read(places, self._adapters.configs[handover.adapter])
            self._sent.add(name)
        while len(self.kept) > MOST_KEPT:
            del self.kept[next(iter(self.kept))]
        self._fill(connector_metadata.fill)

    def _fill(self, sequences: list[tuple[Places, Handover]]) -> None:
        """Into all pages of all layers in one copy."""
        into, values = [], []
        for places, handover in sequences:
            rows = handover.pages(self._adapters)
            for place, layers in zip(places, self._pages, strict=True):
                into += [pages[place] for _, pages in layers]
                values += [rows[layer] for layer, _ in layers]
        if into:
            device = into[0].device
            torch._foreach_copy_(into, torch.stack(values).to(device).unbind())

    def _read(self, places: Places, config: DeltaMemConfig) -> bytes:
        rows: dict[int, Tensor] = {}
        for place, layers in zip(places, self._pages, strict=True):
            rows |= {layer: pages[place, : state_size(config)] for layer, pages in layers}
        return torch.stack([rows[layer] for layer in sorted(rows)]).cpu().numpy().tobytes()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose pages are free now."""
        sent, self._sent = self._sent, set()
        return sent, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to do: the pages are filled before the pass."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to do."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def wait_for_save(self) -> None:
        """Nothing to do."""
