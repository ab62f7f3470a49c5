"""LoCoMo: questions about conversations of months (Maharana et al. 2024, arXiv 2402.17753).

Prompts, dates and scores follow the authors' evaluation of local models (``task_eval`` of
snap-research/locomo): ``hf_llm_utils.py`` for the words, ``gpt_utils.py`` for which sessions are left out
where the window is too short (the oldest), ``evaluation.py`` for the scores. What differs, and why:

- Sessions stand in the order in which they happened. The authors' script for local models puts each session
  before the ones it has, so that the newest comes first.
- Every session is a message of its own, so that it can be written as one segment; the authors make one text.
- Decoding is greedy as everywhere here; the authors sample at temperature 0.4.
- The two options of a category 5 question stand in an order drawn from the question's id, not a new one
  each run.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from nltk.stem import PorterStemmer

from pipelines.benchmarks.base import Context, Question, limit
from pipelines.benchmarks.records import attempt, read_array, reference, text, usable
from pipelines.config.benchmarks import LocomoSettings
from pipelines.data.documents import BadRecord

CATEGORIES = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop", 5: "adversarial"}

SYSTEM = (
    "You are a helpful, respectful and honest assistant whose job is to understand the following "
    "conversation and answer questions based on the conversation. If you don't know the answer to a "
    "question, please don't share false information."
)
OPENING = (
    "Below is a conversation between two people: {} and {}. The conversation takes place over multiple "
    "days and the date of each conversation is wriiten at the beginning of the conversation."
)
QUESTION = (
    "Based on the above conversations, write a short answer for the following question in a few words. Do "
    "not write complete and lengthy sentences. Answer with exact words from the conversations whenever "
    "possible.\n\n"
    "Question: {}"
)
NO_ANSWER = "No information available"

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STOP_WORD = re.compile(r"\b(?:an?|the|and)\b")
_STEMMER = PorterStemmer()


class Locomo:
    """The benchmark, over the authors' ``locomo10.json``."""

    max_new_tokens = 50
    stop: tuple[str, ...] = ()
    metrics = ("f1",)
    drop_first = "oldest"
    writes_questions = False

    def __init__(self, name: str, settings: LocomoSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        return limit(self._contexts(), self.settings.max_contexts, self.settings.max_questions)

    def _contexts(self) -> Iterator[Context]:
        samples = read_array(self.settings.file, "LoCoMo's conversations")
        place = f"{self.settings.file}, conversation"
        self.bad_records.clear()
        return usable(samples, self._context, place, "a LoCoMo conversation", self.bad_records)

    def _context(self, number: int, sample: Mapping[str, Any]) -> Context | None:
        sample_id = text(sample["sample_id"], "sample_id")
        history = conversation_messages(sample["conversation"], self.settings.message == "turn")
        questions = []
        for index, record in enumerate(sample["qa"]):
            question = attempt(
                lambda index=index, record=record: self._asked(sample_id, index, record),
                "question", sample_id, "a LoCoMo question", self.bad_records, f"{sample_id}/{index}",
            )  # fmt: skip
            questions += question or []
        return Context(sample_id, history, questions) if questions else None

    def _asked(self, sample_id: str, index: int, record: Mapping[str, Any]) -> list[Question]:
        """The question of a record, if its category is to be asked."""
        category = record["category"]
        if category not in CATEGORIES:
            raise ValueError(f"its category is {category!r}; expected one of 1 to 5")
        return [_question(sample_id, index, record)] if category in self.settings.categories else []

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        return {"f1": answer_score(question, prediction)}


def conversation_messages(conversation: Mapping[str, Any], by_turn: bool) -> list[dict[str, str]]:
    """Who talks; then the sessions in order, each with its date: a user message per session, or per turn."""
    numbers = sorted(int(key.split("_")[1]) for key in conversation if re.fullmatch(r"session_\d+", key))
    messages = []
    for number in numbers:
        head = f"DATE: {conversation[f'session_{number}_date_time']}\nCONVERSATION:\n"
        turns = [_turn(turn) for turn in conversation[f"session_{number}"]]
        if turns:
            messages += [head + turn for turn in turns] if by_turn else [head + "\n".join(turns)]
    opening = OPENING.format(conversation["speaker_a"], conversation["speaker_b"])
    return [{"role": "user", "content": text} for text in [opening, *messages]]


def _turn(turn: Mapping[str, str]) -> str:
    text = f'{turn["speaker"]} said, "{turn["text"]}"'
    return f"{text} and shared {turn['blip_caption']}." if turn.get("blip_caption") else text


def _question(sample_id: str, index: int, record: Mapping[str, Any]) -> Question:
    question_id, category = f"{sample_id}/{index}", record["category"]
    question = asked = text(record["question"], "question")
    options: dict[str, str] = {}
    if category == 5:
        options = _options(question_id, reference(record["answer" if "answer" in record else "adversarial_answer"]))
        asked += f" (a) {options['a']} (b) {options['b']}. Select the correct answer by writing (a) or (b)."
        expected = next(f"({letter})" for letter, option in options.items() if option == NO_ANSWER)
    else:
        # what follows a semicolon explains an inference and is not scored (evaluation.py, category 3)
        answer = reference(record["answer"])
        expected = text(answer.split(";")[0], "answer").strip() if category == 3 else answer
    if category == 2:
        asked += " Use DATE of CONVERSATION to answer with an approximate date."
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION.format(asked)}]
    return Question(
        question_id,
        sample_id,
        messages,
        [expected],
        CATEGORIES[category],
        {"options": options},
        asked=question,
    )


def _options(question_id: str, wrong: str) -> dict[str, str]:
    first = hashlib.sha256(question_id.encode()).digest()[0] % 2
    return {"a": NO_ANSWER, "b": wrong} if first else {"a": wrong, "b": NO_ANSWER}


# --- scores (evaluation.py) ------------------------------------------------------------------------


def answer_score(question: Question, prediction: str) -> float:
    """The score of an answer as it was generated, in [0, 1], by the rule of its category.

    Temporal, open-domain and single-hop questions: F1 of stemmed tokens. Multi-hop: the comma-separated
    parts of the reference, each with the part of the answer that matches it best, averaged. Adversarial: 1
    if the answer says that there is no answer.
    """
    answer = clean_answer(prediction, question.extra["options"])
    if question.category == "adversarial":
        return float(NO_ANSWER.lower() in answer.lower() or "not mentioned" in answer.lower())
    if question.category == "multi_hop":
        return multi_answer_f1(answer, question.references[0])
    return stemmed_f1(answer, question.references[0])


def clean_answer(prediction: str, options: Mapping[str, str]) -> str:
    """The first line in lower case, without the letters of options, or the text of the option it chooses."""
    line = prediction.replace('\\"', "'").strip().split("\n")[0].strip().lower()
    if options:
        return options["a" if "(a)" in line else "b"]
    for mark in ("(a)", "(b)", "a)", "b)", "answer:"):
        line = line.replace(mark, "")
    return line.strip()


def stemmed_tokens(text: str) -> list[str]:
    """Porter stems of the words, in lower case, without ASCII punctuation, articles and "and"."""
    words = _STOP_WORD.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split()
    return [_stem(word) for word in words]


@cache
def _stem(word: str) -> str:
    return _STEMMER.stem(word)


def stemmed_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of stems; 0 where they have none in common."""
    predicted, expected = stemmed_tokens(prediction), stemmed_tokens(reference)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def multi_answer_f1(prediction: str, reference: str) -> float:
    """Mean over the parts of the reference of the best F1 of any part of the prediction; commas part."""
    parts, answers = prediction.split(","), reference.split(",")
    return sum(max(stemmed_f1(part, answer) for part in parts) for answer in answers) / len(answers)
