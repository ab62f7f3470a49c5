"""One chat between two turns as a value, and what its next turn has to feed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deltamem.chat.messages import EncodedMessages, Message
from deltamem.decoding.key_values import KeyValues
from deltamem.errors import DeltaMemError
from deltamem.memory import DeltaMemory


def checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Copies of the messages.

    Raises:
        DeltaMemError: one isn't a {"role": text, "content": text}.
    """
    for number, message in enumerate(messages):
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DeltaMemError(f'message {number} is not a {{"role": text, "content": text}}: {message!r:.100}')
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise DeltaMemError(f"message {number} isn't text that UTF-8 can hold: {error}") from error
    return tuple(dict(message) for message in messages)


@dataclass(frozen=True)
class StoredPart:
    """A file that holds the keys and values of the next ``tokens`` tokens of a saved chat."""

    folder: str
    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class ChatState:
    """One chat between two turns.

    Attributes:
        memory: its DeltaMemory (one row).
        messages: all messages, from the first.
        start: index of the first message that still is in the prompt; those before it (a system message
            excepted) have left the key-value cache and stay in the memory only.
        tokens: the prompt's token ids, those that ``keys`` holds.
        keys: the key-value cache; empty where the engine keeps it.
        parts: files that hold a beginning of ``keys`` already.
    """

    memory: DeltaMemory
    messages: tuple[Message, ...] = ()
    start: int = 0
    tokens: tuple[int, ...] = ()
    keys: KeyValues = field(default_factory=KeyValues)
    parts: tuple[StoredPart, ...] = ()

    @property
    def system(self) -> tuple[Message, ...]:
        """The system message the chat began with, if any; it never leaves the prompt."""
        return self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else ()

    @property
    def visible(self) -> tuple[Message, ...]:
        """The messages in the prompt."""
        return self.system + self.messages[max(self.start, len(self.system)) :]

    @property
    def forgotten(self) -> int:
        """How many messages are in the memory only."""
        return len(self.messages) - len(self.visible)

    def cleared(self) -> ChatState:
        """All turns out of the prompt and in the memory only, as if the window had moved past them."""
        return ChatState(self.memory, self.messages, len(self.messages))


@dataclass(frozen=True)
class Prompt:
    """What a turn has to feed.

    Attributes:
        rebuild: tokens of earlier turns to read again into an empty cache without writing them; None: the
            cache goes on as it is.
        new: the new tokens and their segments, to be read and written.
        start: the chat's new ``start``.
    """

    rebuild: tuple[int, ...] | None
    new: EncodedMessages
    start: int
