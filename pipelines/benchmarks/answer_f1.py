"""Answer F1 as QASPER defines it (Dasigi et al. 2021, section 5).

The overlap of answer and reference as bags of tokens, after the normalisation of SQuAD (Rajpurkar et al.
2016); of several references the best one counts. Yes/no and unanswerable questions are scored as the words
"Yes", "No" and "Unanswerable".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLE = re.compile(r"\b(?:an?|the)\b")


def answer_tokens(text: str) -> list[str]:
    """Tokens to compare: lower case, without ASCII punctuation and English articles, cut at white space."""
    return ARTICLE.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split()


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of token precision and recall, in [0, 1].

    Nothing in common is 0, also when both are empty after normalisation, as in QASPER's evaluator.
    """
    return bag_f1(answer_tokens(prediction), answer_tokens(reference))


def bag_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of tokens, in [0, 1]; 0 where they have nothing in common."""
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """Best F1 of the prediction over the references. Raises ValueError if there is none."""
    if not references:
        raise ValueError("a prediction can't be scored without a reference answer")
    return max(token_f1(prediction, reference) for reference in references)
