"""A prepared backbone: its folder read back as a model and a tokenizer, and the digest of what lies in it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_flash_attn_2_available

from deltamem.backbone.facts import computed_dtype
from pipelines.backbones.record import RECORD, backbone_record, make_anew
from pipelines.errors import StageError
from pipelines.run.files import file_digest


def load_backbone(
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a prepared backbone in eval mode, with its tokenizer (which always has a padding token).

    `dtype` and `attn_implementation` default to what the configuration said, `device` to the CPU. A CPU without
    instructions for the configuration's dtype computes in float32.
    FlashAttention falls back to sdpa where it is missing or can't run. A backbone whose entry has a quantization is
    quantised by transformers on its way to the device. Raises StageError when the folder is incomplete or damaged,
    when there is no such device, when the weights don't fit on it, or when they can't be quantised that way.
    """
    folder, device = Path(folder), _device(device or "cpu")
    spec = backbone_record(folder)["source"]
    if dtype is None:
        dtype = computed_dtype(getattr(torch, spec["dtype"]), device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    quantization = _quantization(folder.name, spec.get("quantization"), device)
    if not quantization:  # how much the quantised weights take only the method knows
        _check_room(folder, dtype, device)
    attention = _attention(attn_implementation or spec["attn_implementation"], dtype, device)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StageError(_damaged(folder, error)) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            **quantization,
        )
    except (OSError, SafetensorError) as error:
        raise StageError(_damaged(folder, error)) from error
    return (model if quantization else model.to(device)).eval(), load_tokenizer(folder)


def _quantization(name: str, settings: dict[str, Any] | None, device: torch.device) -> dict[str, Any]:
    """What transformers is told to quantise a backbone on its way to the device."""
    if settings is None:
        return {}
    try:
        return {"quantization_config": AutoQuantizationConfig.from_dict(dict(settings)), "device_map": {"": device}}
    except (ImportError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise StageError(
            f"backbones.{name}.quantization: transformers can't use it ({type(error).__name__}: {error}); see its "
            "documentation on quantization_config, and install the package that the method needs"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone folder; it has a chat template, and always a padding token.

    Raises StageError if there is none that can be loaded, or it has no chat template.
    """
    if not folder.is_dir():
        raise StageError(
            f"{folder}: there is no such folder; run the backbone stage first, python -m pipelines.backbone"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder}: no tokenizer can be loaded; run the backbone stage first, with a source that has one ({error})"
        ) from error
    if not tokenizer.chat_template:
        raise StageError(
            f"{folder}: the tokenizer has no chat template, so messages can't be put to this backbone; choose a chat "
            "model as backbone"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def content_digest(folder: Path) -> str:
    """sha256 (hex) over the names and contents of all files that make the backbone.

    The version of transformers that wrote a JSON file doesn't count.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != RECORD:
            total.update(f"{path.name} {_model_file_digest(path)}\n".encode())
    return total.hexdigest()


def _model_file_digest(path: Path) -> str:
    if path.name in ("config.json", "generation_config.json"):
        content = json.loads(path.read_text())
        content.pop("transformers_version", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return file_digest(path)


def _damaged(folder: Path, error: Exception) -> str:
    return f"{folder} is not a complete backbone folder ({error}). {make_anew(folder)}"


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StageError(f"There is no device {name}; it may be cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StageError(
            f"Device {device} was asked for, but torch sees no CUDA device. Set use_gpu: false in the "
            "configuration (in a benchmark --device cpu), or run where there is a GPU."
        )
    return device


def _check_room(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    needed = _parameter_count(folder) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise StageError(
            f"The backbone {folder} doesn't fit on {device}: its weights take {needed / 2**30:.1f} GiB in "
            f"{dtype}, and {free / 2**30:.1f} GiB are free. Choose a smaller backbone or dtype, or a larger "
            "machine."
        )


def _parameter_count(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:  # a header of JSON after its length; nothing is mapped or read beyond it
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(length, path.stat().st_size)))
            except ValueError as error:
                raise StageError(_damaged(folder, error)) from error
        header.pop("__metadata__", None)
        count += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return count


def _attention(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    flash = device.type == "cuda" and dtype.itemsize == 2 and is_flash_attn_2_available()
    return "sdpa" if wanted == "flash_attention_2" and not flash else wanted
