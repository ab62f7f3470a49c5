"""A chat that remembers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deltamem.chat import session_files
from deltamem.chat.batch import Batch
from deltamem.chat.messages import Message
from deltamem.chat.reply import Reply, TurnOptions
from deltamem.chat.runtime import ChatRuntime
from deltamem.chat.state import ChatState
from deltamem.chat.turn import Turn, choose, frozen_turn
from deltamem.errors import ChatExistsError, DeltaMemError
from deltamem.memory import DeltaMemory
from deltamem.model import DeltaMemModel


@torch.no_grad()
def reply_pieces(turn: Turn) -> Iterator[str]:
    """Run one turn by itself until its reply is complete, yielding the reply's text as it comes."""
    batch, logits = Batch(), turn.prefill()
    while True:
        piece = turn.accept(choose([turn], logits)[0])
        if piece:
            yield piece
        if turn.finish_reason:
            break
        logits = batch.step([turn])
    batch.release()


class ChatSession:
    """Turns in, replies out, over one cache and one memory; each turn processes only its new tokens.

        session = ChatSession(model, tokenizer)
        session.send("My name is Ada.")
        for piece in session.stream("What is my name?"): print(piece, end="")

    What a turn writes is told in :mod:`deltamem.chat.turn`. When the chat outgrows the window, the oldest turns
    leave the prompt and stay in the memory only: ``last_reply.newly_forgotten`` says how many messages did so
    in the last turn, ``forgotten`` how many have in all. A turn happens or it doesn't: an exception, or
    closing the stream before its end, leaves the session as it was. One session serves one thread at a time;
    sessions on one model are independent.

    Args:
        model: with the memory; it stays as it is.
        tokenizer: the backbone's.
        system: system message to begin with.
        window: most tokens of prompt and reply (the backbone's limit by default).
        write: whether turns are written; may be changed between turns.

    Attributes:
        last_reply: the last turn's :class:`deltamem.chat.reply.Reply`; None before the first, and after what isn't a
            turn (reset, undo, a cleared prompt).

    Raises:
        DeltaMemError: the tokenizer has no chat template.
        WindowError: the backbone doesn't allow such a window.
    """

    def __init__(
        self,
        model: DeltaMemModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        window: int | None = None,
        write: bool = True,
    ):
        self.runtime = ChatRuntime(model, tokenizer, window)
        self.system, self.write = system, write
        self.state = self.runtime.new_state()
        self.last_reply: Reply | None = None
        self._before: ChatState | None = None

    @property
    def messages(self) -> list[Message]:
        """All messages so far, those forgotten included."""
        return [dict(message) for message in self.state.messages]

    @property
    def memory(self) -> DeltaMemory:
        """What the chat has written so far: states float32 [1, N, r, r]."""
        return self.state.memory

    @property
    def forgotten(self) -> int:
        """How many messages have left the prompt and stay in the memory only."""
        return self.state.forgotten

    def stream(self, message: str | Sequence[Message], **options: Any) -> Iterator[str]:
        """Answer a message, piece by piece.

        Args:
            message: the user's words, or several messages ({"role", "content"}), the last one to be answered.
            **options: see :class:`deltamem.chat.reply.TurnOptions`; where nothing is said, the likeliest tokens, 512 at
                most.

        Raises:
            WindowError: the message alone doesn't fit the window.
            DeltaMemError: an option outside its domain, or no message.
            TypeError: an option of another name.
        """
        turn = Turn(self.runtime, self.state, self._new(message), self._options(options))
        yield from reply_pieces(turn)
        with torch.no_grad():
            after = turn.finish()
        # share the old turns' storage with the new cache instead of holding both
        shares = turn.plan.rebuild is None
        self._before = replace(self.state, keys=after.keys.cut(0, self.state.keys.length)) if shares else self.state
        self.state, self.last_reply = after, turn.summary()

    def send(self, message: str | Sequence[Message], **options: Any) -> Reply:
        """The whole reply at once, with its counts of tokens. Arguments and errors as in :meth:`stream`."""
        for _ in self.stream(message, **options):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def compare(self, message: str | Sequence[Message], **options: Any) -> tuple[Reply, Reply]:
        """Answers with the memory, and of the frozen backbone given the visible messages; changes nothing.

        Arguments and errors as in :meth:`stream`.
        """
        how, new = replace(self._options(options), write=False), self._new(message)
        turns = (Turn(self.runtime, self.state, new, how), frozen_turn(Turn, self.runtime, self.state, new, how))
        for turn in turns:
            for _ in reply_pieces(turn):
                pass
        return turns[0].summary(), turns[1].summary()

    def reset(self) -> None:
        """Forget everything: an empty chat with an empty memory."""
        self._before, self.state, self.last_reply = self.state, self.runtime.new_state(), None

    def clear_prompt(self) -> None:
        """All turns leave the prompt and stay in the memory only, as if the window had moved past them."""
        self._before, self.state, self.last_reply = self.state, self.state.cleared(), None

    def undo(self) -> None:
        """Take back the last turn (or reset, or cleared prompt): messages, cache and memory are as before it.

        Raises:
            DeltaMemError: there is nothing to take back; one turn is kept.
        """
        if self._before is None:
            raise DeltaMemError("there is no turn to take back: only the last one can be, once")
        self.state, self._before, self.last_reply = self._before, None, None

    def fork(self) -> ChatSession:
        """An independent session from this one's state (shared, not copied, as states never change)."""
        twin = object.__new__(ChatSession)
        twin.__dict__.update(self.__dict__)
        return twin

    def save(self, folder: str | Path, overwrite: bool = True) -> None:
        """Write the session to a folder of safetensors and JSON (see :mod:`deltamem.chat.session_files`); atomic.

        Saving to the same folder again appends what is new.

        Args:
            overwrite: False spares a folder that holds another chat (as after a reset) or somebody else's files.

        Raises:
            ChatExistsError: the folder holds another chat, and isn't to be overwritten.
            OSError: the folder can't be written.
        """
        folder = Path(folder)
        if not overwrite and session_files.holds_another_chat(folder, self.state):
            raise ChatExistsError(f"{folder} holds another chat: name another folder")
        settings = {"system": self.system, "write": self.write, "window": self.runtime.window}
        self.state = session_files.save(self.runtime, self.state, folder, settings)

    @classmethod
    def load(cls, model: DeltaMemModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> ChatSession:
        """Read what :meth:`save` or a server wrote; with its cache, the next token's logits are the same to the bit.

        Raises:
            SnapshotError: the folder is damaged, or was saved with another adapter or backbone.
        """
        settings = session_files.read_manifest(Path(folder))["settings"]
        session = cls(model, tokenizer, settings.get("system"), settings.get("window"), settings.get("write", True))
        session.state = session_files.load(session.runtime, Path(folder))
        return session

    def _new(self, message: str | Sequence[Message]) -> list[Message]:
        new = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
        if not new:
            raise DeltaMemError("there is no message to answer")
        if self.system is not None and not self.state.messages:
            new.insert(0, {"role": "system", "content": self.system})
        return new

    def _options(self, options: dict[str, Any]) -> TurnOptions:
        options.setdefault("write", self.write)
        return TurnOptions(**options)
