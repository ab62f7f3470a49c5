"""HotpotQA, development set, distractor setting (Yang et al. 2018, arXiv 1809.09600).

Scores are those of the authors' ``hotpot_evaluate_v1.py``. The instruction and the passages are worded as
in the evaluation of δ-mem's public release; each passage is a message of its own here, and the instruction
follows them ("above", where the release has it in front and says "below").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.benchmarks.answer_f1 import answer_tokens
from pipelines.benchmarks.base import Context, Question, limit
from pipelines.benchmarks.files import expecting, read_json
from pipelines.config.benchmarks import HotpotqaSettings
from pipelines.data.files import from_hub

QUESTION = (
    "Answer the question using only the passages above.\nReply with a short span or yes/no only.\n\n"
    "Question: {}\nAnswer:"
)
_CLOSED = {"yes", "no", "noanswer"}


class Hotpotqa:
    """The benchmark, over the authors' file or the Hub's copy; one context of paragraphs per question."""

    max_new_tokens = 32
    stop: tuple[str, ...] = ()
    metrics = ("exact_match", "f1")
    drop_first = "newest"

    def __init__(self, name: str, settings: HotpotqaSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings

    def contexts(self) -> Iterator[Context]:
        return limit(self._contexts(), self.settings.max_contexts, self.settings.max_questions)

    def _contexts(self) -> Iterator[Context]:
        where = self.settings.file or self.settings.hub_id
        for number, record in enumerate(self._records()):
            with expecting(f"{where}, question {number}", "a HotpotQA question"):
                yield _context(record)

    def _records(self) -> Iterator[Mapping[str, Any]]:
        if self.settings.file is not None:
            return iter(read_json(self.settings.file))
        import datasets

        hub_id, revision = self.settings.hub_id, self.settings.hub_revision
        return iter(
            from_hub(
                f"{hub_id}, distractor, validation",
                "give the path of hotpot_dev_distractor_v1.json as 'file'",
                lambda: datasets.load_dataset(hub_id, "distractor", split="validation", revision=revision),
            )
        )

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        lines = prediction.strip().splitlines()
        answer, reference = lines[0] if lines else "", question.references[0]
        return {"exact_match": exact_match(answer, reference), "f1": answer_f1(answer, reference)}


def _context(record: Mapping[str, Any]) -> Context:
    question_id = record["_id"] if "_id" in record else record["id"]
    asked = record["question"].strip()
    messages = [{"role": "user", "content": QUESTION.format(asked)}]
    question = Question(question_id, question_id, messages, [record["answer"].strip()], record["type"], asked=asked)
    history = [
        {"role": "user", "content": f"Passage {number} - {title}:\n{text}"}
        for number, (title, text) in enumerate(_passages(record["context"]), start=1)
    ]
    return Context(question_id, history, [question])


def _passages(context: Any) -> Iterator[tuple[str, str]]:
    """(title, text) of each paragraph; the authors' file has pairs, the Hub two lists."""
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    for title, sentences in pairs:
        text = " ".join(sentence.strip() for sentence in sentences).strip()
        if text:
            yield title, text


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
