"""What people say to a model, out of the files of data sets, without what anyone replied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipelines.benchmarks.test_time_learning import Example, read_banking77, read_clinc150, read_trec
from pipelines.config.data import AskedFile, TweetqaSource
from pipelines.data.documents import BadRecord
from pipelines.data.files import mended, text_lines
from pipelines.data.sources import chat, tweetqa


def user_turns(asked: AskedFile, bad: list[BadRecord]) -> Iterator[str]:
    """The texts of a file, in its order, without white space around them.

    Args:
        bad: what of the file can't be used is added.

    Raises:
        StageError: the file can't be read, or isn't of its form.
    """
    for text in _READERS[asked.form](asked.file, bad):
        if said := mended(text)[0].strip():
            yield said


def _of_chats(file: str, bad: list[BadRecord]) -> Iterator[str]:
    for number, record in chat.records(Path(file)):
        try:
            yield from (m["content"] for m in chat.chat_messages(record) if m["role"] == "user")
        except ValueError as error:
            bad.append(BadRecord("chat", f"{Path(file).name}:{number}", None, str(error)))


def _tweets(file: str, bad: list[BadRecord]) -> Iterator[str]:
    whole = TweetqaSource(kind="tweetqa", train_files=[file], eval_files=[file])
    corpus = tweetqa.load(whole, "eval", Path())
    bad += corpus.bad_records
    for document in corpus.documents:
        yield document.messages[0]["content"]


def _texts(examples: Iterable[Example]) -> Iterator[str]:
    return (example.text for example in examples)


_READERS: dict[str, Callable[[str, list[BadRecord]], Iterable[str]]] = {
    "chat": _of_chats,
    "lines": lambda file, bad: text_lines(file, "expected a text on every line"),
    "banking77": lambda file, bad: _texts(read_banking77(file, bad)),
    "clinc150": lambda file, bad: _texts(read_clinc150(file, bad)[0]),
    "trec": lambda file, bad: _texts(read_trec(file, False, bad)),
    "tweetqa": _tweets,
}
