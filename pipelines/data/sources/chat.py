"""Chats of one's own: earlier messages are written, the last stay visible, the assistant's replies are learnt.

A chat's first reply has nothing before it that could be written; if wanted, it is learnt from an empty memory.

A record is ``{"messages": [{"role", "content"}, …]}`` or ``{"prompt": text, "response": text}``, with an ``id`` if it
has one; a content may be a list of text parts, as OpenAI's requests have them. ``"finished": false`` says that its last
reply was cut off, so that no end is learnt of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deltamem.chat.messages import Message
from pipelines.config.data import ChatSource
from pipelines.data.documents import BadRecord, Document, Exercise, Reading, Split, at_least_one, hold_out, read_files
from pipelines.data.files import (
    from_hub,
    hub_origin,
    kind_of,
    mended,
    parquet_rows,
    parse_json,
    parse_json_lines,
    text_lines,
    text_of,
)
from pipelines.errors import StageError

EXPECTED = "records with 'messages' (each with role and content), or with 'prompt' and 'response'"
ROLES = ("system", "user", "assistant")
_ENDINGS = {".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}


def load(settings: ChatSource, split: Split, folder: Path) -> Reading:
    """The chats of a split; all that is learnt from one chat is held out together."""
    if not settings.train_files:
        return _from_hub(settings, split)
    own = split == "eval" and settings.eval_files
    paths = settings.eval_files if own else settings.train_files
    reading = read_files(paths, lambda path, bad: _documents(records(path), path.name, settings, bad), EXPECTED)
    return reading if settings.eval_files else hold_out(reading, split, settings.eval_share)


def _from_hub(settings: ChatSource, split: Split) -> Reading:
    import datasets

    own = split == "eval" and settings.hub_eval_split
    name = settings.hub_eval_split if own else settings.hub_split
    hub_id = str(settings.hub_id)
    where = f"{hub_id}, split {name}"
    table = from_hub(
        where,
        "give the files of the data set as 'train_files'",
        lambda: datasets.load_dataset(hub_id, revision=settings.hub_revision, split=name),
    )
    rows = list(table)
    bad: list[BadRecord] = []
    documents = at_least_one(_documents(enumerate(rows, start=1), hub_id, settings, bad), bad, where, EXPECTED)
    reading = Reading(documents, bad, {**hub_origin(hub_id, settings.hub_revision, table, rows), "split": name})
    return reading if settings.hub_eval_split else hold_out(reading, split, settings.eval_share)


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of every record, from 1 (of a line in a file of lines), and the record or a ValueError.

    Raises StageError where the file isn't one of chats.
    """
    ending = next((suffix for suffix in reversed(path.suffixes) if suffix in _ENDINGS), None)
    if ending is None:
        raise StageError(f"{path}: the name must end with {', '.join(_ENDINGS)} (or one of them and .gz)")
    expected = f"expected {EXPECTED}"
    if _ENDINGS[ending] == "lines":
        return parse_json_lines(text_lines(path, expected))
    if _ENDINGS[ending] == "parquet":
        return enumerate(parquet_rows(path, f"a file of {EXPECTED}"), start=1)
    text = text_of(path, expected)
    content = parse_json(text, path, f"{expected} in one array; a file with a record a line is named .jsonl")
    if not isinstance(content, list):
        raise StageError(f"{path}: the file holds {kind_of(content)}; expected an array of {EXPECTED}")
    return enumerate(content, start=1)


def _documents(
    found: Iterable[tuple[int, Any]], file: str, settings: ChatSource, bad: list[BadRecord]
) -> Iterator[Document]:
    for number, record in found:
        record, damaged = mended(record)
        chat_id = f"{file}:{number}"
        if isinstance(record, dict) and isinstance(record.get("id"), str | int):
            chat_id = str(record["id"])
        if damaged:
            bad.append(BadRecord("characters", chat_id, None, f"{damaged} lone surrogates, replaced by U+FFFD"))
        try:
            messages = chat_messages(record)
            finished = _finished(record)
            replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            if not replies:
                raise ValueError("it has no reply of the assistant's")
        except ValueError as error:
            bad.append(BadRecord("chat", chat_id, None, str(error)))
            continue
        for reply in replies[-1:] if settings.supervise == "last" else replies:
            try:
                yield _document(chat_id, messages, reply, settings, reply < replies[-1] or finished)
            except ValueError as error:
                bad.append(BadRecord("reply", chat_id, f"{chat_id}/{reply}", str(error)))


def chat_messages(record: Any) -> list[Message]:
    """The messages of a record. Raises ValueError, with the reason, where it isn't a chat."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"it is {kind_of(record)}; expected {EXPECTED}")
    if record.get("messages") is None and {"prompt", "response"} <= set(record):
        pair = (("user", record["prompt"]), ("assistant", record["response"]))
        return [{"role": role, "content": _text(content, role)} for role, content in pair]
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        found = ", ".join(map(str, record)) or "no keys"
        raise ValueError(f"it has no list of messages ({found}); expected {EXPECTED}")
    return [_message(message, f"message {number}") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"{where}: its role is {role!r}; expected one of {', '.join(ROLES)}")
    return {"role": role, "content": _text(message.get("content"), where)}


def _finished(record: dict[str, Any]) -> bool:
    finished = record.get("finished")  # null where a column has it for other records
    if not isinstance(finished, bool | None):
        raise ValueError(f"finished is {kind_of(finished)}; expected true, or false where the last reply was cut off")
    return finished is not False


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):
        texts: list[Any] = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str):
        raise ValueError(f"{where}: its content is {kind_of(content)}, not text")
    return content


def _document(chat_id: str, messages: list[Message], reply: int, settings: ChatSource, finished: bool) -> Document:
    """What is written, read and learnt of one reply.

    Raises ValueError where there is nothing of one of them; nothing need be written if first replies are wanted.
    """
    if not messages[reply]["content"].strip():
        raise ValueError("the reply is empty")
    system = [message for message in messages[:1] if message["role"] == "system"]
    before = messages[len(system) : reply]
    earlier, visible = before[: -settings.visible], before[-settings.visible :]
    if not visible:
        raise ValueError("no message comes before the reply")
    written = before if settings.write == "all" else earlier
    first = not any(message["content"].strip() for message in written)
    if first and not settings.first_replies:
        raise ValueError(
            f"there is nothing to write: no text comes before what is visible (visible: {settings.visible}; with "
            "write: all, the visible messages are written too; with first_replies, it is learnt from an empty memory)"
        )
    document_id = f"{chat_id}/{reply}"
    kind = "first_reply" if first else "reply"
    exercise = Exercise(document_id, [*system, *visible], [messages[reply]["content"]], kind, finished=finished)
    messages = [] if first else [*system, *written]
    return Document(document_id, messages, [exercise], "chat", group=chat_id, drop_first="oldest", empty_memory=first)
