"""From chat messages to tokens and segments, through the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from os.path import commonprefix
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from deltamem.chat.literal_text import LiteralText, Shield
from deltamem.chat.messages import EncodedMessages, Message
from deltamem.config import SegmentRule
from deltamem.errors import DeltaMemError

# A sentence ends at . ! ? … (and closing quotes or brackets) before white space, or at a blank line.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n\s*\n")
# In the public release at ; and : too but not at …, and what stands between two sentences belongs to the later one.
_BETWEEN_RELEASE_SENTENCES = re.compile(r"(?<=[.!?;:])[\"'”’)\]]*\s+|\n{2,}")

# Stand-ins for the contents of messages, which show where the template's own text lies.
_MARK, _ANY_MARK = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")
# Stand in for the turns before, whose text a later turn need not render again.
_EARLIER = [
    {"role": "user", "content": "First question."},
    {"role": "assistant", "content": "First answer."},
]
# Answers come without a thinking block (Qwen3, SmolLM3), and the same messages give the same text on every day
# (SmolLM3's template prints the date).
TEMPLATE_OPTIONS: dict[str, Any] = {
    "enable_thinking": False,
    "strftime_now": lambda form: date(2025, 1, 1).strftime(form),
}


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    segment: SegmentRule | None = "message",
) -> EncodedMessages:
    """Render messages through the chat template and number their segments (paper, Method, sequence-state write).

    A segment is the content of one message that isn't the system's (or one sentence of it). The system message,
    the template's own tokens around a message and the generation prompt belong to none (-1). By the public release's
    rule ("release_message") a message's segment is all the text that it adds to the rendered chat. Control tokens in
    a content are text like any other (:mod:`deltamem.chat.literal_text`).

    Args:
        messages: [{"role": "system", "user" or "assistant", "content": text}, …].
        add_generation_prompt: end with what the template puts before a reply.
        segment: None where nobody needs segments, as tsw and msw don't: they are the messages where the template lets
            them be found, else there are none.

    Raises:
        DeltaMemError: the tokenizer has no chat template, or segments are asked for and its template changes the
            messages' text, so that they can't be found.
    """
    text = _render(tokenizer, messages, add_generation_prompt)
    spans = _segment_spans(tokenizer, text, messages, add_generation_prompt, segment)
    return _numbered(*text.encode(tokenizer), spans)


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], segment: SegmentRule | None
) -> EncodedMessages:
    """New messages of a chat, from the end of the last reply's own text to the beginning of the next.

    Only the new messages are rendered, after two stand-ins, so a template that rewrites earlier turns (leaves out
    their reasoning, dates the system message) can't make the tokens before wrong.

    Arguments and errors as in :func:`encode_messages`.
    """
    text, end = _after_stand_ins(tokenizer, messages)
    spans = _segment_spans(tokenizer, text, [*_EARLIER, *messages], True, segment)
    ids, offsets = text.encode(tokenizer)
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > end), len(ids))
    if first < len(ids) and offsets[first][0] < end:  # a token of the reply's last and the template's first characters
        ids, offsets = text.encode(tokenizer, end)
        first = 0
    return _numbered(ids[first:], offsets[first:], spans)


def encode_history(
    tokenizer: PreTrainedTokenizerBase, history: Sequence[Message], messages: Sequence[Message]
) -> list[int]:
    """Earlier turns of a chat, up to the end of the last reply's own text: :func:`encode_turn` goes on from there.

    Raises:
        DeltaMemError: after these turns the template writes the new messages in another way.
    """
    after, end = _after_stand_ins(tokenizer, messages)
    whole = _render(tokenizer, [*history, *messages], True)
    if not whole.text.endswith(after.text[end:]):
        raise DeltaMemError("the chat template writes new messages in another way after these turns")
    return whole.encode(tokenizer, 0, len(whole.text) - (len(after.text) - end))[0]


def encode_reply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str, finished: bool = True
) -> list[int]:
    """The tokens of an assistant's reply to some messages, with the one that ends its turn if it is finished.

    Raises:
        DeltaMemError: the reply is empty, or the chat template puts nothing after it, or changes it.
    """
    return encode_reply_and_part(tokenizer, messages, reply, "", finished)[0]


def encode_reply_and_part(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply: str, part: str, finished: bool = True
) -> tuple[list[int], list[bool]]:
    """The same, and which of its tokens hold something of a part of the reply.

    Args:
        part: some whole words, looked for wherever they stand and whatever their capitals; empty: none.
    """
    chat = [*messages, {"role": "assistant", "content": reply}]
    text = _render(tokenizer, chat, False)
    span = _content_spans(tokenizer, text, chat, False, only=len(chat) - 1)[-1:]
    ids, offsets = text.encode(tokenizer)
    inside = _numbered(ids, offsets, [(start, end) for _, start, end in span]).segment_ids
    end = max((i for i, segment in enumerate(inside) if segment == 0), default=-1) + 1
    if not reply.strip() or end == len(ids):
        raise DeltaMemError("the reply is empty, or the chat template puts no end-of-turn token after it")
    its = slice(inside.index(0), end + finished)
    words = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)", re.IGNORECASE)
    found = [match.span() for _, start, stop in span for match in words.finditer(text.text, start, stop) if part]
    return ids[its], [number >= 0 for number in _numbered(ids[its], offsets[its], found).segment_ids]


def _after_stand_ins(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[LiteralText, int]:
    """New messages after the stand-ins for earlier ones, and where in that text the reply among these ends."""
    rendered = _render(tokenizer, [*_EARLIER, *messages], True)
    question, answer = (message["content"] for message in _EARLIER)
    place = rendered.text.find(answer, rendered.text.find(question) + len(question))
    if place < 0:
        raise DeltaMemError(
            "the chat template changes an assistant's text, so what follows a reply can't be told apart from it; a "
            "chat needs a template that keeps it"
        )
    return rendered, place + len(answer)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool) -> LiteralText:
    """The messages' text.

    Raises:
        DeltaMemError: there is no chat template, or it refuses them.
    """
    if tokenizer.chat_template is None:
        raise DeltaMemError("this tokenizer has no chat template; encode the text yourself and pass segment_ids")
    shield = Shield(tokenizer, messages)
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation_prompt, **TEMPLATE_OPTIONS}
    try:
        text = tokenizer.apply_chat_template(shield.messages, **options)
    except TemplateError:
        # some templates insist on alternating roles; neighbours of one role then share one turn
        try:
            text = tokenizer.apply_chat_template(_merge_neighbours(shield.messages), **options)
        except TemplateError as error:
            raise DeltaMemError(f"the chat template refuses these messages: {error}") from error
    return shield.lift(cast(str, text))


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
    tokenizer: PreTrainedTokenizerBase,
    text: LiteralText,
    messages: Sequence[Message],
    generation_prompt: bool,
    segment: SegmentRule | None,
) -> list[tuple[int, int]]:
    """[start, end) in the rendered text of every segment, in order."""
    if segment == "release_message":
        return _added_spans(tokenizer, text.text, messages)
    try:
        contents = _content_spans(tokenizer, text, messages, generation_prompt)
    except DeltaMemError:
        if segment is None:
            return []
        raise
    spans: list[tuple[int, int]] = []
    for number, start, end in contents:
        if messages[number]["role"] == "system" or start == end:
            continue
        if segment in ("sentence", "release_sentence"):
            spans += [(start + a, start + b) for a, b in sentence_spans(text.text[start:end], segment)]
        else:
            spans.append((start, end))
    return spans


def _added_spans(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """What each message that isn't the system's adds to the chat so far.

    What the template writes differently once a message follows, such as the end of a shared turn, is the later one's.
    """
    ends = [0]
    for count in range(1, len(messages) + 1):
        so_far = _render(tokenizer, messages[:count], False).text
        ends.append(len(so_far) if text.startswith(so_far) else len(commonprefix([so_far, text])))
    spans = zip(messages, ends, ends[1:], strict=False)
    return [(start, end) for message, start, end in spans if message["role"] != "system" and start < end]


def _content_spans(
    tokenizer: PreTrainedTokenizerBase,
    rendered: LiteralText,
    messages: Sequence[Message],
    generation_prompt: bool,
    only: int | None = None,
) -> list[tuple[int, int, int]]:
    """(message, start, end): where in the rendered text each content stands, in the order of the text.

    The same chat is rendered with stand-ins for the contents, which shows how much of the template's own text comes
    before each: a content is looked for after that, because it may itself occur there ("art" in "<|im_start|>"). The
    template may put contents in another order (Mistral's moves the system message), or leave out part of one (Qwen3's
    leaves out earlier reasoning), which then ends where the template's own text goes on.

    Args:
        only: the one message to look for; None: all.

    Raises:
        DeltaMemError: the template changes a content.
    """
    marked = [
        {**message, "content": _MARK.format(i) if only in (None, i) else message["content"]}
        for i, message in enumerate(messages)
    ]
    parts = _ANY_MARK.split(_render(tokenizer, marked, generation_prompt).text)
    text, position = rendered.text, 0
    spans: list[tuple[int, int, int]] = []
    for before, name, after in zip(parts[0::2], parts[1::2], parts[2::2], strict=False):
        number = int(name)
        content = messages[number]["content"].strip()
        begin = position + len(before)
        start = text.find(content, begin)
        end = start + len(content)
        if start < 0 or text[begin:start].strip():  # not here: is there a part of it?
            start, end = _left_of(content, text, begin, after) or (start, end)
        if start < 0:
            raise DeltaMemError(
                f"the chat template changed the text of message {number} ({messages[number]['role']}), so its segment "
                "can't be found; encode the text yourself and pass segment_ids"
            )
        spans.append((number, start, end))
        position = end
    return spans


def _left_of(content: str, text: str, begin: int, after: str) -> tuple[int, int] | None:
    """Where the part of a content stands that lies between ``begin`` and the template's text after it, if one does."""
    end = text.find(after, begin) if after.strip() else len(text)
    part = text[begin:end].strip()
    if end < 0 or part not in content:
        return None
    start = text.find(part, begin)
    return start, start + len(part)


def _numbered(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> EncodedMessages:
    """Each token with the number of the span that it lies in, or touches."""
    segment_ids, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        inside = current < len(spans) and spans[current][0] < end and start < spans[current][1]
        segment_ids.append(current if inside else -1)
    return EncodedMessages(ids, segment_ids)


def sentence_spans(text: str, rule: SegmentRule = "sentence") -> list[tuple[int, int]]:
    """[start, end) of every sentence; together they cover the text."""
    if rule == "release_sentence":
        inner = [match.start() for match in _BETWEEN_RELEASE_SENTENCES.finditer(text)]
    else:
        inner = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [0, *inner, len(text)]
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
