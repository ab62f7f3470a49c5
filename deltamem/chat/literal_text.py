"""Text that stays text: a content that spells a control token ("<|im_end|>") must not become one.

Tokenizers make control tokens of their names wherever they stand, so a message, or a paper, could end its own turn and
begin another's. Names in contents are hidden from the template by stand-ins, which show where they come to stand in the
rendered text; there the text is tokenised in pieces that hold no name whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from deltamem.chat.messages import Message
from deltamem.errors import DeltaMemError


@dataclass(frozen=True)
class LiteralText:
    """A rendered text.

    Attributes:
        names: (place, name) of control tokens' names that are text, in order.
    """

    text: str
    names: tuple[tuple[int, str], ...] = ()

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, begin: int = 0, stop: int | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the characters [begin, stop), and [start, end) of each in the text."""
        stop = len(self.text) if stop is None else stop
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        lead = ""
        for place, name in [*(named for named in self.names if begin <= named[0] < stop), (stop, "")]:
            end = place + len(name[:1])  # between the name's first character and its second
            # the name itself goes before the rest, as a control token that is dropped: what follows one is tokenised as
            # within a text, not as at the beginning of one
            piece = tokenizer(lead + self.text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
            skip, shift = len(lead[:1]), begin - len(lead)
            ids += piece["input_ids"][skip:]
            offsets += [(a + shift, b + shift) for a, b in piece["offset_mapping"][skip:]]
            begin, lead = end, name
        return ids, offsets


class Shield:
    """Messages in whose contents stand-ins take the place of control tokens' names.

    Attributes:
        messages: for the template.

    Raises:
        DeltaMemError: a role holds such a name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]):
        added = tokenizer.added_tokens_decoder.values()
        names = _any_of(tuple(token.content for token in added if token.special))
        self.messages, self._names = list(messages), []
        if names is None:
            return
        for message in messages:
            if names.search(message["role"]):
                raise DeltaMemError(f"the role {message['role']!r} holds a control token of the backbone's")
        if any(names.search(message["content"]) for message in messages):
            self._stand_in = _unused("".join(message["content"] for message in messages))
            self.messages = [{**message, "content": names.sub(self._hide, message["content"])} for message in messages]

    def _hide(self, match: re.Match[str]) -> str:
        self._names.append(match[0])
        return f"{self._stand_in}{len(self._names) - 1}{self._stand_in}"

    def lift(self, text: str) -> LiteralText:
        """The rendered text with the names back in it."""
        if not self._names:
            return LiteralText(text)
        pieces = re.split(f"{self._stand_in}(\\d+){self._stand_in}", text)
        whole, names = pieces[0], []
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            name = self._names[int(number)]
            names.append((len(whole), name))
            whole += name + after
        return LiteralText(whole, tuple(names))


@lru_cache(maxsize=16)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches each name, the longest that fits."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _unused(text: str) -> str:
    """A character for private use that a text doesn't hold."""
    return next(chr(code) for code in range(0xE100, 0xF8FF) if chr(code) not in text)
