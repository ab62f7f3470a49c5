"""From chat messages to tokens and segments, through the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from deltamem.chat.messages import EncodedMessages, Message
from deltamem.errors import DeltaMemError

# A sentence ends at . ! ? … (and closing quotes or brackets) before white space, or at a blank line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n\s*\n")

# Stand-ins for the contents of messages, which show where the template's own text lies.
_MARK, _ANY_MARK = "\ue000{}\ue001", re.compile("\ue000\\d+\ue001")
# Answers come without a thinking block (Qwen3, SmolLM3), and the same messages give the same text on every day
# (SmolLM3's template prints the date).
TEMPLATE_OPTIONS = {"enable_thinking": False, "strftime_now": lambda form: date(2025, 1, 1).strftime(form)}


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    segment: Literal["message", "sentence"] = "message",
) -> EncodedMessages:
    """Render messages through the chat template and number their segments.

    A segment is the content of one message that isn't the system's (or one sentence of it). The system message,
    the template's own tokens around a message and the generation prompt belong to none (-1).

    Raises:
        DeltaMemError: the tokenizer has no chat template, or its template changes or reorders the messages' text.
    """
    if tokenizer.chat_template is None:
        raise DeltaMemError("this tokenizer has no chat template; encode the text yourself and pass segment_ids")
    text = _render(tokenizer, messages, add_generation_prompt)
    marked = [{"role": m["role"], "content": _MARK.format(i)} for i, m in enumerate(messages)]
    scaffold = _ANY_MARK.split(_render(tokenizer, marked, add_generation_prompt))
    spans = _segment_spans(text, messages, [len(part) for part in scaffold], segment)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    segment_ids, current = [], 0
    for start, end in encoded["offset_mapping"]:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        inside = current < len(spans) and spans[current][0] < end and start < spans[current][1]
        segment_ids.append(current if inside else -1)
    return EncodedMessages(encoded["input_ids"], segment_ids)


def encode_reply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str) -> list[int]:
    """The tokens of an assistant's reply to some messages, with the one that ends its turn.

    Raises:
        DeltaMemError: the reply is empty, or the chat template puts nothing after it.
    """
    chat = encode_messages(tokenizer, [*messages, {"role": "assistant", "content": reply}])
    last = max(chat.segment_ids)
    end = len(chat.segment_ids) - chat.segment_ids[::-1].index(last)
    if not reply.strip() or end == len(chat.input_ids):
        raise DeltaMemError("the reply is empty, or the chat template puts no end-of-turn token after it")
    return chat.input_ids[chat.segment_ids.index(last) : end + 1]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **TEMPLATE_OPTIONS}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except TemplateError:
        # some templates insist on alternating roles; neighbours of one role then share one turn
        try:
            return tokenizer.apply_chat_template(_merge_neighbours(messages), **options)
        except TemplateError as error:
            raise DeltaMemError(f"the chat template refuses these messages: {error}") from error


def _merge_neighbours(messages: Sequence[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            content = merged[-1]["content"].strip() + "\n\n" + message["content"].strip()
            merged[-1] = {"role": message["role"], "content": content}
        else:
            merged.append(dict(message))
    return merged


def _segment_spans(
    text: str, messages: Sequence[Message], scaffold: Sequence[int], segment: str
) -> list[tuple[int, int]]:
    """[start, end) in the rendered text of every segment, in order.

    Args:
        scaffold: how much of the template's own text comes before each message's content; a content is looked for
            after it, because it may itself occur there ("art" in "<|im_start|>").
    """
    spans: list[tuple[int, int]] = []
    position = 0
    for number, (message, before) in enumerate(zip(messages, scaffold, strict=False)):
        content = message["content"].strip()
        start = text.find(content, position + before)
        if start < 0:
            raise DeltaMemError(
                f"the chat template changed the text of message {number} ({message['role']}), so its segment can't be "
                "found; encode the text yourself and pass segment_ids"
            )
        position = start + len(content)
        if message["role"] == "system" or not content:
            continue
        if segment == "message":
            spans.append((start, position))
        else:
            spans += [(start + a, start + b) for a, b in sentence_spans(content)]
    return spans


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of every sentence; together they cover the text."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
