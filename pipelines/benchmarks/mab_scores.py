"""MemoryAgentBench's scores (``utils/eval_other_utils.py`` of the benchmark)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from pipelines.benchmarks.answer_f1 import answer_tokens
from pipelines.benchmarks.hotpotqa import answer_f1, exact_match

_ANSWER = re.compile(r"(?:answer|label):(.*)(?:\n|$)", re.IGNORECASE)
_NUMBER = re.compile(r"^(?:\d+[.)、]?\s*[-—–]?\s*)?")
_PARENTHESES = re.compile(r"\([^()]*\)")


def parsed_answer(text: str) -> str:
    """What follows the first "Answer:" or "label:" on its line; without either, the first line.

    The benchmark looks for "Answer:" alone, although its classification tasks ask for "label: …"; their
    source (HELMET, Yen et al. 2024) looks for "label:", without which no answer in the asked form could be
    right.
    """
    found = _ANSWER.search(text)
    line = found[1] if found else text.split("\n", 1)[0]
    return re.sub(r"^(?:answer|label):", "", line.strip(), flags=re.IGNORECASE).strip()


def text_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match, F1 and match as a substring: the best over references, of the whole answer and its parsed part."""
    answers = [prediction, parsed_answer(prediction)]
    pairs = [(answer, reference) for answer in answers for reference in references]
    return {
        "exact_match": max(exact_match(answer, reference) for answer, reference in pairs),
        "f1": max(answer_f1(answer, reference) for answer, reference in pairs),
        "substring_exact_match": max(substring_match(answer, reference) for answer, reference in pairs),
    }


def substring_match(prediction: str, reference: str) -> float:
    """1 where the normalised reference is part of the normalised answer, even inside a word."""
    return float(" ".join(answer_tokens(reference)) in " ".join(answer_tokens(prediction)))


def all_parts(prediction: str, references: Sequence[str]) -> float:
    """1 where every reference is in the answer, whatever the case (EventQA)."""
    return float(all(reference.lower() in prediction.lower() for reference in references))


def movie_names(entities: Mapping[str, int]) -> dict[int, str]:
    """{id: name} from the catalogue {address: id}: the address's last part, without year and underscores."""
    return {number: _title(address) for address, number in entities.items()}


def recall_at_5(prediction: str, references: Sequence[str], names: Mapping[int, str]) -> float:
    """Share of the movies to find (ids as text) among the first five that the answer recommends.

    Every line after "1." is a recommendation, an empty one too, and stands for the movie of the catalogue
    whose name has the smallest edit distance. Without "1.", commas part recommendations as well.
    """
    head, mark, rest = prediction.partition("1.")
    lines = (rest if mark else head.replace(",", "\n")).split("\n")[:5]
    catalogue = list(dict.fromkeys(names.values()))
    recommended = {_nearest(_recommendation(line), catalogue) for line in lines}
    wanted = [names[int(reference)] for reference in references]
    return sum(name in recommended for name in wanted) / len(wanted)


def _nearest(name: str, catalogue: list[str]) -> str:
    return process.extractOne(name, catalogue, scorer=Levenshtein.distance, processor=str.lower)[0]


def _recommendation(line: str) -> str:
    return " ".join(_NUMBER.sub("", _PARENTHESES.sub("", line.strip())).split())


def _title(address: str) -> str:
    name = re.sub(r"[_\->]", " ", address.split("/")[-1])
    return " ".join(_PARENTHESES.sub("", name).split())
