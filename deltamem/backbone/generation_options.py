"""What a ``generate`` call asks for, wherever it says so, and what of that a memory can't do."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from deltamem.errors import DeltaMemError

CACHES = (None, "dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid")
"""Kinds of caches that transformers makes by name; each can carry a memory."""

_ROLLS_BACK = "assisted decoding rolls the cache back, which a memory can't follow; leave it out"
_REFUSED = {
    "assistant_model": _ROLLS_BACK,
    "prompt_lookup_num_tokens": _ROLLS_BACK,
    "assistant_early_exit": _ROLLS_BACK,
    "custom_generate": "a decoding loop of one's own can't be followed by the memory; run forward() in it instead",
    "token_healing": "it takes back the prompt's last tokens, which a memory can't follow; leave it out",
    "inputs": "pass the prompt as input_ids",
    "inputs_embeds": "the prompt must come as input_ids",
}


class GenerationOptions:
    """The options of one call.

    Attributes:
        arguments: the call's own, as transformers takes them.
    """

    def __init__(self, base: PreTrainedModel, arguments: dict[str, Any]):
        self.arguments, self.device = arguments, base.device
        self._configs = (arguments.get("generation_config"), base.generation_config)

    def get(self, name: str) -> Any:
        """An option's value: of the arguments, else of the generation config passed, else of the backbone's."""
        if name in self.arguments:
            return self.arguments[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    def check(self, by_segment: bool) -> None:
        """Refuse what a memory can't follow.

        Args:
            by_segment: segments of the prompt are to be written.

        Raises:
            DeltaMemError: names the option.
        """
        for name, reason in _REFUSED.items():
            value = self.get(name)
            if value is not None and value is not False:
                raise DeltaMemError(f"{name}: {reason}")
        if self.get("use_cache") is False:
            raise DeltaMemError("use_cache=False feeds the prompt again at every step and would write it again")
        kind = self.get("cache_implementation")
        if kind not in CACHES:
            names = ", ".join(repr(name) for name in CACHES if name)
            raise DeltaMemError(
                f"cache_implementation={kind!r}: pass such a cache as past_key_values=...; by name there are {names}"
            )
        if by_segment and self.get("prefill_chunk_size"):
            raise DeltaMemError(
                "prefill_chunk_size cuts the prompt where a segment may go on, and ssw writes a segment's mean over "
                "all of its tokens; leave it out, or pass write=False"
            )

    def keep_eager(self) -> None:
        """transformers compiles the whole forward for caches of a fixed size; deltamem.decoding captures graphs."""
        cache, kind = self.arguments.get("past_key_values"), self.get("cache_implementation")
        if getattr(cache, "is_compileable", False) or "static" in (kind or ""):
            self.arguments.setdefault("disable_compile", True)
