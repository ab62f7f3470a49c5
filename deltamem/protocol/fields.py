"""What becomes of a request's fields that no reply here can show; docs/server.md has them all in one table.

Clients send more than they mean: switches in their off position, nulls, hints for other servers. What asks for nothing
is let pass; what asks for something that isn't served is refused with the reason, and never dropped in silence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from deltamem.protocol.errors import RequestError

# Labels, and hints about cost: a reply would be the same with them and without.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "safety_identifier", "service_tier", "parallel_tool_calls", "prediction",
        "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
        "request_id", "priority", "cache_salt",  # vLLM
        "cache_prompt", "id_slot", "timings_per_token", "return_progress",  # llama.cpp
    }
)  # fmt: skip


class Unserved(NamedTuple):
    """A field that isn't served.

    Attributes:
        why: the reason, for whoever sends another value than a neutral one.
        neutral: the values that ask for nothing; null always does.
    """

    why: str
    neutral: tuple[Any, ...]


_TOOLS = "the model is shown no tools, so it can call none"
_TEXT = "replies are text and nothing else"
_FREE = "replies are free text, which no grammar or schema constrains"
_ONE = "a session goes on from one reply; ask again for another"
_NO_LOGPROBS = "log-probabilities aren't told"
_TEMPLATE = "messages are put to the model as its own chat template says, without a reasoning block"
_SAMPLER = (
    "this way of drawing tokens isn't served (served: temperature, top_p, top_k, min_p, typical_p, and penalties)"
)
_END = "a reply ends where the model ends it, before a stop sequence, or at max_tokens"

UNSERVED = {
    "tools": Unserved(_TOOLS, ([],)),
    "tool_choice": Unserved(_TOOLS, ("none", "auto")),
    "functions": Unserved(_TOOLS, ([],)),
    "function_call": Unserved(_TOOLS, ("none", "auto")),
    "web_search_options": Unserved(_TOOLS, ()),
    "response_format": Unserved(_FREE, ({"type": "text"},)),
    "modalities": Unserved(_TEXT, (["text"],)),
    "audio": Unserved(_TEXT, ()),
    "moderation": Unserved("nothing here moderates", ()),
    "n": Unserved(_ONE, (1,)),
    "logprobs": Unserved(_NO_LOGPROBS, (False,)),
    "top_logprobs": Unserved(_NO_LOGPROBS, (0,)),
    "reasoning_effort": Unserved(_TEMPLATE, ("none", "minimal")),
    "verbosity": Unserved("say in a message how long a reply is to be", ("medium",)),
    # vLLM's
    "best_of": Unserved(_ONE, (1,)),
    "use_beam_search": Unserved(_ONE, (False,)),
    "length_penalty": Unserved(_ONE, (1,)),
    "prompt_logprobs": Unserved(_NO_LOGPROBS, (0,)),
    "chat_template": Unserved(_TEMPLATE, ()),
    "chat_template_kwargs": Unserved(_TEMPLATE, ({}, {"enable_thinking": False})),
    "add_generation_prompt": Unserved(_TEMPLATE, (True,)),
    "continue_final_message": Unserved(_TEMPLATE, (False,)),
    "add_special_tokens": Unserved(_TEMPLATE, (False,)),
    "documents": Unserved(_TEMPLATE, ([],)),
    "echo": Unserved(_TEXT, (False,)),
    "skip_special_tokens": Unserved(_TEXT, (True,)),
    "spaces_between_special_tokens": Unserved(_TEXT, (True, False)),
    "min_tokens": Unserved(_END, (0,)),
    "ignore_eos": Unserved(_END, (False,)),
    "stop_token_ids": Unserved(_END, ([],)),
    "include_stop_str_in_output": Unserved(_END, (False,)),
    "truncate_prompt_tokens": Unserved("old turns leave the prompt by themselves and stay in the memory", ()),
    "bad_words": Unserved(_SAMPLER, ([],)),
    "allowed_token_ids": Unserved(_SAMPLER, ([],)),
    "structured_outputs": Unserved(_FREE, ({},)),
    "guided_json": Unserved(_FREE, ()),
    "guided_regex": Unserved(_FREE, ("",)),
    "guided_choice": Unserved(_FREE, ([],)),
    "guided_grammar": Unserved(_FREE, ("",)),
    # llama.cpp's
    "grammar": Unserved(_FREE, ("",)),
    "json_schema": Unserved(_FREE, ({},)),
    "n_predict": Unserved("say max_tokens", (-1,)),
    "n_probs": Unserved(_NO_LOGPROBS, (0,)),
    "mirostat": Unserved(_SAMPLER, (0,)),
    "mirostat_tau": Unserved(_SAMPLER, (5,)),
    "mirostat_eta": Unserved(_SAMPLER, (0.1,)),
    "dynatemp_range": Unserved(_SAMPLER, (0,)),
    "dynatemp_exponent": Unserved(_SAMPLER, (1,)),
    "xtc_probability": Unserved(_SAMPLER, (0,)),
    "dry_multiplier": Unserved(_SAMPLER, (0,)),
    "tfs_z": Unserved(_SAMPLER, (1,)),
    "samplers": Unserved(_SAMPLER, ([],)),
    "reasoning_format": Unserved(_TEMPLATE, ("none", "auto")),
}


def meant(fields: dict[str, Any], served: frozenset[str]) -> dict[str, Any]:
    """The fields that ask for something, without those that don't.

    Args:
        served: names of the fields that are looked at.

    Raises:
        RequestError: a field asks for something that isn't served; it is named.
    """
    asked = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    for name, value in asked.items():
        if name in served:
            continue
        if name in UNSERVED and value not in UNSERVED[name].neutral:
            raise RequestError(f"{name}: {UNSERVED[name].why}", "unsupported", name)
        if name not in UNSERVED and value:
            raise RequestError(f"{name}: this server knows no such field", "unknown_field", name)
    return {name: value for name, value in asked.items() if name in served}
