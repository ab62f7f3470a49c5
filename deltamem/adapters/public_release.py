"""The public release's adapter format: delta_mem_config.json and delta_mem_adapter.pt.

Facts of the format are from its published files and code (arXiv 2605.12357's repository). The weights are a pickle,
read with ``weights_only=True``: a pickle that holds anything but tensors is refused, never run.
"""

from __future__ import annotations

import errno
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deltamem.adapters.names import without_limits
from deltamem.config import HEADS, DeltaMemConfig
from deltamem.errors import AdapterFormatError, ConfigError

CONFIG_FILE = "delta_mem_config.json"
WEIGHTS_FILE = "delta_mem_adapter.pt"

# Options that change the function, with the only value that this library computes.
SUPPORTED = {
    "normalize_qk": True,
    "couple_lambda": True,
    "rankwise_gates": True,
    "state_update_mode": "standard",
    "memory_backend": "delta_rule",
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_fusion_mode": "add",
    "memory_fusion_placement": "attention_output",
    "target_modules": ["self_attn"],
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "slot_read_top_k": 0,
    "synthetic_memory_slots": 1,
    "memory_reader_layers": [],
    "latent_memory_layers": [],
    "delta_o_rmsnorm": False,
    "trainable_delta_scale": False,
    "delta_scale_parameterization": "alpha_over_rank",
}
# Settings of features that the options above switch off.
DETAILS = (
    "memory_partition_", "global_memory_", "memory_reader_", "projected_kv_", "latent_", "rwkv_", "delta_scale_",
    "memory_fusion_", "memory_write_proposals", "tie_memory_partition", "delta_o_rmsnorm_eps", "base_slice_ref_width",
)  # fmt: skip
GRANULARITY: dict[str, Literal["message", "sentence"] | None] = {
    "token": None,
    "message_mean": "message",
    "sentence_mean": "sentence",
}
READ = {
    "rank", "alpha", "num_state_heads", "memory_write_granularity", "delta_heads", "target_layers", "beta_bias_init",
    "output_init", "online_gain",
}  # fmt: skip


def read(folder: Path, values: dict[str, Any]) -> tuple[DeltaMemConfig, dict[str, Tensor]]:
    """Read a folder in the public format.

    Args:
        values: what its delta_mem_config.json holds.

    Parameters of heads that are not steered exist in the format, are zero and untrained; they are left out.

    Raises:
        AdapterFormatError: missing file, pickle with code in it, unsupported option (named), tensors that don't fit.
    """
    config = config_from_public(values, str(folder / CONFIG_FILE))
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterFormatError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterFormatError(
            f"{path} holds more than tensors and was not loaded, because loading it could run code: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise AdapterFormatError(f"{path} is not a readable tensor file: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFormatError(f"{path} must hold a dictionary of tensors")
    unused = tuple(f".delta_{head}_proj" for head in HEADS if head not in config.steer)
    for name in [n for n in tensors if n.endswith(unused)]:
        if tensors.pop(name).count_nonzero():
            raise AdapterFormatError(f"{path}: {name} is not zero, but delta_heads does not steer that head")
    return config, tensors


def write(folder: Path, config: DeltaMemConfig, tensors: dict[str, Tensor]) -> None:
    """Write a folder in the public format.

    Args:
        tensors: as :func:`deltamem.adapters.tensors.collect_tensors` names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_public(config), indent=2) + "\n", encoding="utf-8")
    path = folder / WEIGHTS_FILE
    try:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in without_limits(tensors).items()}, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(errno.EIO, f"can't be written ({error})", str(path)) from error


def config_from_public(values: dict[str, Any], where: str) -> DeltaMemConfig:
    """Translate the public config.

    Raises:
        AdapterFormatError: an option that would change the function and isn't supported, by name.
    """
    for key, value in values.items():
        if key in SUPPORTED:
            if value != SUPPORTED[key] and value is not None:
                raise AdapterFormatError(f"{where}: {key}={value!r} is not supported, only {SUPPORTED[key]!r}")
        elif key not in READ and not key.startswith(DETAILS) and value not in (None, False, 0, "", [], {}):
            warnings.warn(f"{where}: unknown option {key}={value!r} is ignored", stacklevel=2)
    granularity = values.get("memory_write_granularity", "token")
    if granularity not in GRANULARITY:
        raise AdapterFormatError(
            f"{where}: memory_write_granularity={granularity!r} is not supported, only {', '.join(GRANULARITY)}"
        )
    segment = GRANULARITY[granularity]
    num_states = values.get("num_state_heads", 1)
    heads = values.get("delta_heads", HEADS)
    heads = heads.replace(",", "") if isinstance(heads, str) else heads
    output_init = values.get("output_init", "base_slice")
    try:
        return DeltaMemConfig(
            strategy="ssw" if segment else "msw" if num_states != 1 else "tsw",
            rank=values.get("rank", 8),
            alpha=values.get("alpha", 16.0),
            num_states=num_states,
            steer=tuple(heads),
            layers=tuple(values.get("target_layers") or ()) or None,
            segment=segment or "message",
            segmentation="release" if segment else "deltamem",
            beta_bias_init=values.get("beta_bias_init", -1.5),
            online_gain=values.get("online_gain", 0.05),
            output_init="base_slice" if output_init in ("base_slice", "base_slice_fixed") else
            "zero" if output_init == "zero" else "random",
        )  # fmt: skip
    except ConfigError as error:
        raise AdapterFormatError(f"{where}: {error}") from error


def config_to_public(config: DeltaMemConfig) -> dict[str, Any]:
    """The inverse of :func:`config_from_public`.

    The format has no word for this project's own segments and none for limits of norms: an adapter that writes by the
    ones or has the others is warned of.
    """
    if config.limit_norms:
        warnings.warn(
            "this adapter limits how large its states grow, which the public release doesn't know: there a memory of "
            "many thousand tokens will be another",
            stacklevel=2,
        )
    if config.strategy == "ssw" and config.segmentation != "release":
        warnings.warn(
            f"this adapter was trained with each {config.segment}'s text alone as a segment; the public release adds "
            "the template's text around it or ends sentences at ; and : too, so that it will write somewhat else",
            stacklevel=2,
        )
    granularity = "token" if config.strategy != "ssw" else f"{config.segment}_mean"
    return {
        **SUPPORTED,
        "rank": config.rank,
        "alpha": config.alpha,
        "num_state_heads": config.num_states,
        "memory_write_granularity": granularity,
        "delta_heads": list(config.steer),
        "target_layers": list(config.layers or ()),
        "beta_bias_init": config.beta_bias_init,
        "output_init": config.output_init,
        "base_slice_ref_width": config.rank,
        "online_gain": config.online_gain,
    }
