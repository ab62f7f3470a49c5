"""HotpotQA, development set, distractor setting (Yang et al. 2018, arXiv 1809.09600).

Scores are those of the authors' ``hotpot_evaluate_v1.py``; under its protocol, those of δ-mem's public release. Each
passage is a message of its own. The question is put after them, in words of our own: the release asks for the same in
front of them, in others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deltamem.chat.messages import Message
from pipelines.benchmarks import release_scores
from pipelines.benchmarks.answer_f1 import answer_tokens
from pipelines.benchmarks.base import Context, Question, limit
from pipelines.benchmarks.records import read_array, reference, text, usable
from pipelines.config.benchmarks import HotpotqaSettings
from pipelines.data.documents import BadRecord
from pipelines.data.files import from_hub

QUESTION = (
    "The passages above hold what is asked for. Give the answer alone, in as few words as they have for it, or say yes "
    "or no.\n\nQuestion: {}\nAnswer:"
)
FORM = "a HotpotQA question"
_CLOSED = {"yes", "no", "noanswer"}


class Hotpotqa:
    """The benchmark, over the authors' file or the Hub's copy; one context of paragraphs per question."""

    max_new_tokens = 32
    stop: tuple[str, ...] = ()
    metrics = ("exact_match", "f1")
    drop_first = "newest"
    writes_questions = False

    def __init__(self, name: str, settings: HotpotqaSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        return limit(self._contexts(), self.settings.max_contexts, self.settings.max_questions)

    def _contexts(self) -> Iterator[Context]:
        place = f"{self.settings.file or self.settings.hub_id}, question"
        self.bad_records.clear()
        return usable(self._records(), _context, place, FORM, self.bad_records)

    def _records(self) -> Iterable[Any]:
        if self.settings.file is not None:
            return read_array(self.settings.file, "HotpotQA's questions")
        import datasets

        hub_id, revision = self.settings.hub_id, self.settings.hub_revision
        return from_hub(
            f"{hub_id}, distractor, validation",
            "give the path of hotpot_dev_distractor_v1.json as 'file'",
            lambda: datasets.load_dataset(hub_id, "distractor", split="validation", revision=revision),
        )

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        if self.settings.protocol == "release":
            answer, reference = release_scores.first_line(prediction), question.references[0]
            return {
                "exact_match": release_scores.exact_match(answer, reference),
                "f1": release_scores.f1(answer, reference),
            }
        lines = prediction.strip().splitlines()
        answer, reference = lines[0] if lines else "", question.references[0]
        return {"exact_match": exact_match(answer, reference), "f1": answer_f1(answer, reference)}


def _context(number: int, record: Mapping[str, Any]) -> Context:
    question_id = text(record["_id"] if "_id" in record else record["id"], "id")
    asked = text(record["question"], "question").strip()
    messages = [{"role": "user", "content": QUESTION.format(asked)}]
    answer, category = reference(record["answer"]).strip(), text(record["type"], "type")
    question = Question(question_id, question_id, messages, [answer], category, asked=asked)
    history: list[Message] = [
        {"role": "user", "content": f"Passage {place} - {title}:\n{passage}"}
        for place, (title, passage) in enumerate(_passages(record["context"]), start=1)
    ]
    if not history:
        raise ValueError("its passages are empty")
    return Context(question_id, history, [question])


def _passages(context: Any) -> Iterator[tuple[str, str]]:
    """(title, text) of each paragraph; the authors' file has pairs, the Hub two lists."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    for title, sentences in pairs:
        passage = " ".join(sentence.strip() for sentence in sentences).strip()
        if passage:
            yield title, passage


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same after SQuAD's normalisation."""
    return float(answer_tokens(prediction) == answer_tokens(reference))


def answer_f1(prediction: str, reference: str) -> float:
    """F1 of tokens; an answer or a reference that is "yes", "no" or "noanswer" has to match as a whole."""
    predicted, expected = answer_tokens(prediction), answer_tokens(reference)
    if predicted != expected and (" ".join(predicted) in _CLOSED or " ".join(expected) in _CLOSED):
        return 0.0
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
