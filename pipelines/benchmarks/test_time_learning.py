"""MemoryAgentBench's test-time learning, rebuilt: a mapping from texts to numbers, learnt from examples.

Here are its classification tasks, made again from the data sets that they come from; results are of the
rebuilt task, not of the benchmark's own file.

Examples and questions are drawn as in the benchmark's source (HELMET, Yen et al. 2024): the same number of
every label, in rounds, under numbers that are shuffled so that they say nothing about the label. The
benchmark has one context; here are several, each with its own examples, numbers and questions, so that there
is another context's memory to compare with. A message of the history is a run of whole examples.

The original files, read as their authors publish them: banking77's ``train.csv`` and ``test.csv``; clinc150's
``data_full.json``, whose out-of-scope texts are one more label and whose validation texts are the questions;
TREC's ``train_5500.label`` and ``TREC_10.label``, or, for the coarse labels, the same with a number for each
(``TREC.train.all``, ``TREC.test.all``).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pipelines.benchmarks.base import Context, Question
from pipelines.benchmarks.mab_scores import text_scores
from pipelines.benchmarks.mab_sources import CLASSIFICATION, SYSTEM
from pipelines.benchmarks.records import AS_PUBLISHED, DOWNLOAD, text, usable
from pipelines.config.benchmarks import TtlSettings
from pipelines.data.chunks import cut_text
from pipelines.data.documents import BadRecord
from pipelines.data.files import read_json, text_of
from pipelines.errors import StageError


class Example(NamedTuple):
    text: str
    label: str


class TestTimeLearning:
    """One rebuilt task: contexts of labelled examples, and questions for the label of a text."""

    __test__ = False  # a benchmark's name, not a test

    max_new_tokens = CLASSIFICATION.max_new_tokens
    stop: tuple[str, ...] = ()
    metrics = ("exact_match",)
    drop_first = "oldest"
    writes_questions = False

    def __init__(self, name: str, settings: TtlSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        self.bad_records.clear()
        train, test = _read(self.settings, self.bad_records)
        unknown = {example.label for example in test} - {example.label for example in train}
        if unknown:
            raise StageError(
                f"{self.settings.test_file}: the labels {', '.join(sorted(unknown))} have no example in "
                f"{self.settings.train_file}. Use the two files of one data set."
            )
        draw = random.Random(self.settings.seed)
        test_stream = _in_rounds(test, draw)
        for number in range(self.settings.contexts):
            numbers = _shuffled_numbers(train, draw)
            shots = list(islice(_in_rounds(train, draw), self.settings.shots))
            asked = list(islice(test_stream, self.settings.questions))
            yield self._context(f"{self.settings.dataset}/{number}", numbers, shots, asked)

    def _context(self, context_id: str, numbers: dict[str, int], shots: list[Example], asked: list[Example]) -> Context:
        examples = "\n\n".join(f"{shot.text}\nlabel: {numbers[shot.label]}" for shot in shots)
        history = [
            {"role": "user", "content": CLASSIFICATION.intro + chunk}
            for chunk in cut_text(examples, self.settings.chunk_characters)
        ]
        questions = [
            Question(
                question_id=f"{context_id}/{index}",
                cluster_id=context_id,
                messages=[
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": CLASSIFICATION.ask(example.text)},
                ],
                references=[str(numbers[example.label])],
                asked=example.text,
            )
            for index, example in enumerate(asked)
        ]
        return Context(context_id, history, questions)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        return {"exact_match": text_scores(prediction, question.references)["exact_match"]}


def _shuffled_numbers(examples: list[Example], draw: random.Random) -> dict[str, int]:
    labels = sorted({example.label for example in examples})
    return dict(zip(labels, draw.sample(range(len(labels)), len(labels)), strict=True))


def _in_rounds(examples: list[Example], draw: random.Random) -> Iterator[Example]:
    """Without end: rounds of one example per label, each shuffled; a label that is used up starts again."""
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    streams = [_endless(of_label, draw) for of_label in by_label.values()]
    while True:
        this_round = [next(stream) for stream in streams]
        draw.shuffle(this_round)
        yield from this_round


def _endless(examples: list[Example], draw: random.Random) -> Iterator[Example]:
    while True:
        yield from draw.sample(examples, len(examples))


# --- the data sets' files --------------------------------------------------------------------------


def _read(settings: TtlSettings, bad: list[BadRecord]) -> tuple[list[Example], list[Example]]:
    if settings.dataset == "clinc150":
        return read_clinc150(settings.train_file, bad)
    if settings.test_file is None:
        raise StageError(f"{settings.dataset}: test_file is missing; only clinc150 has all in one file.")
    if settings.dataset == "banking77":
        return read_banking77(settings.train_file, bad), read_banking77(settings.test_file, bad)
    fine = settings.dataset == "trec_fine"
    return read_trec(settings.train_file, fine, bad), read_trec(settings.test_file, fine, bad)


def read_banking77(path: str, bad: list[BadRecord]) -> list[Example]:
    """The texts of one of Banking77's files. Raises StageError where it isn't one."""
    rows = csv.DictReader(text_of(path, DOWNLOAD).splitlines(keepends=True))
    if not {"text", "category"} <= set(rows.fieldnames or ()):
        raise StageError(f"{path}: not banking77's CSV file with the columns text and category. {AS_PUBLISHED}")

    def make(number: int, row: dict[str, str]) -> Example:
        return _example(row["text"], row["category"])

    return list(usable(rows, make, f"{path}, row", "a labelled text of banking77", bad))


def read_clinc150(path: str, bad: list[BadRecord]) -> tuple[list[Example], list[Example]]:
    """CLINC150's texts to train on, and those to validate on. Raises StageError where the file isn't its."""
    splits = read_json(path, DOWNLOAD)
    names = ("train", "oos_train", "val", "oos_val")
    if not isinstance(splits, dict) or not all(isinstance(splits.get(name), list) for name in names):
        raise StageError(f"{path}: not clinc150's data_full.json with the lists {', '.join(names)}. {AS_PUBLISHED}")

    def make(number: int, pair: list[str]) -> Example:
        said, label = pair
        return _example(said, label)

    train, test = (
        list(usable(splits[name] + splits[f"oos_{name}"], make, f"{path}, {name}", "a text and its label", bad))
        for name in ("train", "val")
    )
    return train, test


def read_trec(path: str, fine: bool, bad: list[BadRecord]) -> list[Example]:
    """The questions of one of TREC's files. Raises StageError where it isn't one.

    Args:
        fine: under their fine labels, of which there are fifty.
    """

    def make(number: int, line: str) -> Example:
        label, said = line.split(maxsplit=1)
        if fine and ":" not in label:
            raise ValueError("there are no fine labels (CLASS:kind); use TREC's train_5500.label and TREC_10.label")
        return _example(said, label if fine else label.split(":")[0])

    lines = [line for line in text_of(path, DOWNLOAD, "latin-1").splitlines() if line.strip()]
    return list(usable(lines, make, f"{path}, line", "a question of TREC's with its label", bad))


def _example(said: object, label: object) -> Example:
    return Example(text(said, "text").strip(), text(label, "label").strip())
