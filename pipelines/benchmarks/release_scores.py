"""How δ-mem's public release scores answers, where its rules aren't those of the benchmarks' authors.

Punctuation parts words ("U.S." is two), where SQuAD's normalisation drops it; of an answer that has to be short its
first line counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.benchmarks.answer_f1 import ARTICLE, bag_f1

_MARK = re.compile(r"[^\w\s]")


def words(text: str) -> list[str]:
    """Words to compare: lower case, without English articles, cut at white space and punctuation."""
    return _MARK.sub(" ", ARTICLE.sub(" ", text.lower())).split()


def first_line(text: str) -> str:
    """The first line that isn't empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def exact_match(prediction: str, reference: str) -> float:
    """1 where both have the same words in the same order."""
    return float(words(prediction) == words(reference))


def f1(prediction: str, reference: str) -> float:
    """F1 of words, in [0, 1]; 1 where neither has any."""
    predicted, expected = words(prediction), words(reference)
    return bag_f1(predicted, expected) if predicted or expected else 1.0


def best_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over references, of the whole answer and of its first line; of what is empty, none."""
    answers = [answer for answer in (prediction, first_line(prediction)) if answer.strip()]
    return max(
        (f1(answer, reference) for answer in answers for reference in references if reference.strip()), default=0
    )


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 where the words of any reference stand in the answer, even inside a word ("7" in "17")."""
    said = " ".join(words(prediction))
    wanted = [" ".join(words(reference)) for reference in references]
    return float(any(reference and reference in said for reference in wanted))
