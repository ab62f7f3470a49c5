"""δ-mem: an online memory of tiny states for frozen language models (arXiv 2605.12357)."""

import importlib
from typing import Any

from deltamem.config import DeltaMemConfig
from deltamem.errors import DeltaMemError

# These need torch and transformers, whose import takes ten seconds: whoever only checks a configuration
# shouldn't wait for it.
_LOADED_ON_USE = {
    "ChatSession": "deltamem.chat.session",
    "DeltaMemModel": "deltamem.model",
    "DeltaMemOutput": "deltamem.model",
    "DeltaMemory": "deltamem.memory",
    "EncodedMessages": "deltamem.chat.format",
    "encode_messages": "deltamem.chat.format",
    "get_delta_mem_model": "deltamem.model",
}

__version__ = "0.1.0"
__all__ = ["DeltaMemConfig", "DeltaMemError", *_LOADED_ON_USE]


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
