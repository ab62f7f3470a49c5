"""A model from the harness's command line: ``--model_args``, ``--device`` and ``--batch_size``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltamem import DeltaMemModel
from deltamem.errors import DeltaMemError

HARNESS_DEVICE = "cuda:0"
"""What the harness says where its user said nothing."""


def load(
    base: str,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[DeltaMemModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """A backbone, with an adapter if one is named, and its tokenizer.

    Args:
        base: folder or Hub id.
        adapter: whatever :meth:`deltamem.DeltaMemModel.from_pretrained` takes.
        device: None is the GPU where there is one.

    Raises:
        DeltaMemError: backbone or adapter can't be had.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=attn_implementation)
        model = model.to(device).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise DeltaMemError(f"the backbone {base} can't be loaded on {device}: {error}") from error
    return (DeltaMemModel.from_pretrained(model, adapter) if adapter else model), tokenizer


def arguments(model_args: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """What :func:`load` is to be called with.

    Args:
        model_args: the keys of ``--model_args``; ``pretrained``, as the harness's own models call it, is the base.
        device: the harness's, which those keys override.

    Raises:
        DeltaMemError: a key is unknown, or there is no base.
    """
    given = dict(model_args)
    if "pretrained" in given:
        given.setdefault("base", given.pop("pretrained"))
    known = list(inspect.signature(load).parameters)
    if unknown := [key for key in given if key not in known]:
        raise DeltaMemError(f"--model_args: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    if not given.get("base"):
        raise DeltaMemError("--model_args: name the backbone, base=FOLDER_OR_HUB_ID")
    if device == HARNESS_DEVICE and not torch.cuda.is_available() and "device" not in given:
        device = None
        Console(stderr=True).print(f"there is no {HARNESS_DEVICE} here: evaluating on the CPU")
    return {"device": device, **given}


def batch_size(given: int | str | None) -> int:
    """The harness's ``--batch_size`` as a number; without one, 1.

    Raises:
        DeltaMemError: it isn't one, such as "auto".
    """
    if given is None:
        return 1
    if not str(given).isdigit() or int(given) < 1:
        raise DeltaMemError(f"--batch_size {given}: give the number of requests in a pass, such as 8")
    return int(given)
