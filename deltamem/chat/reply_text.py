"""The text of a reply while its tokens arrive: whole characters only, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class ReplyText:
    """Turns tokens into text as they come.

    Args:
        stop: sequences that end the reply; they don't belong to its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._ends: list[int] = []  # length of the text after each token
        self.text: str = ""
        self.shown = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that may be shown because of one more token."""
        self._tokens.append(token)
        self.text += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._ends.append(len(self.text))
        return self._show(self._safe_length())

    def close(self) -> str:
        """The text held back until the reply's end."""
        if not self.stopped:
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            if isinstance(whole, str) and whole.startswith(self.text):  # bytes that make no whole character
                self.text = whole
        return self._show(len(self.text))

    @property
    def kept_tokens(self) -> list[int]:
        """The tokens whose text comes before the stop sequence; all of them without one."""
        if not self.stopped:
            return self._tokens
        count = sum(end <= len(self.text) for end in self._ends)
        while count and self._ends[count - 1] == (self._ends[count - 2] if count > 1 else 0):
            count -= 1  # the first bytes of a character that comes after the cut
        return self._tokens[:count]

    def spans(self) -> list[tuple[int, int]]:
        """[start, end) in the text of every kept token."""
        ends = self._ends[: len(self.kept_tokens)]
        return list(zip([0, *ends], ends, strict=False))

    def _show(self, until: int) -> str:
        piece = self.text[self.shown : until]
        self.shown = max(self.shown, until)
        return piece

    def _safe_length(self) -> int:
        """How much of the text can't become part of a stop sequence; cuts the text at a complete one."""
        found = [at for stop in self._stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return len(self.text)
        held = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:length]):
                    held = length
                    break
        return len(self.text) - held
