"""Answer F1 against values worked out by hand, and the properties it must have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmarks.answer_f1 import answer_f1, answer_tokens, token_f1

texts = st.text(max_size=40) | st.lists(st.sampled_from("the a cat dog BLEU. 3.5".split())).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The BLEU score.", "bleu score", 1.0),
        ("red cat", "red dog", 0.5),  # precision 1/2, recall 1/2
        ("cat", "red cat sat", 0.5),  # precision 1, recall 1/3
        ("cat cat cat", "cat", 0.5),  # a repeated token counts as often as both have it
        ("cat cat dog", "cat cat", 0.8),  # precision 2/3, recall 1
        ("red", "blue", 0.0),
        ("", "blue", 0.0),
        ("blue", "", 0.0),
        ("", "", 0.0),
        ("the", "an", 0.0),  # nothing is left of either
        ("state-of-the-art", "stateoftheart", 1.0),  # punctuation goes before articles do
        ("3.5", "35", 1.0),
        ("“quoted”", "quoted", 0.0),  # only ASCII punctuation is removed
        ("Größe des Étalons", "größe DES étalons", 1.0),
        ("機械 翻訳", "機械", 2 / 3),
        ("Unanswerable", "unanswerable.", 1.0),
        ("Yes, it does", "Yes", 0.5),
        ("No", "Yes", 0.0),
    ],
)
def test_by_hand(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


def test_best_reference_counts():
    references = ["a red dog", "blue cat", "Unanswerable"]
    assert answer_f1("cat", references) == pytest.approx(2 / 3)
    assert answer_f1("unanswerable", references) == 1


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="without a reference"):
        answer_f1("cat", [])


@given(texts, texts)
def test_bounds_and_symmetry(one, other):
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, other) == token_f1(other, one)


@given(texts)
def test_identity(text):
    assert token_f1(text, text) == (1 if answer_tokens(text) else 0)


@given(texts, st.lists(texts, min_size=1, max_size=4), texts)
def test_another_reference_never_lowers_the_score(prediction, references, extra):
    assert answer_f1(prediction, [*references, extra]) >= answer_f1(prediction, references)
