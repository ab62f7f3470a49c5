"""The public release's scores: values by hand, and where they part from the benchmarks' own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmarks import mab_scores, release_scores
from pipelines.benchmarks.hotpotqa import exact_match


@pytest.mark.parametrize(
    ("prediction", "references", "contained", "f1"),
    [
        ("Ann", ["Ann"], 1, 1),
        ("It was the Ann!", ["Bo", "an Ann"], 1, 1 / 2),
        ("Ann\nShe said so.", ["ann"], 1, 1),  # the first line is scored by itself, too
        ("17", ["7"], 1, 0),  # inside a word is inside
        ("label: 17", ["7"], 1, 0),
        ("U.S.", ["u s"], 1, 1),  # punctuation parts words
        ("US", ["U.S."], 0, 0),
        ("", ["Ann"], 0, 0),
        ("Ann", ["", "the"], 0, 0),  # a reference without words is in no answer
        ("blue sky", ["sky blue"], 0, 1),
    ],
)
def test_scores_by_hand(prediction, references, contained, f1):
    assert release_scores.contains(prediction, references) == contained
    assert release_scores.best_f1(prediction, references) == pytest.approx(f1)


def test_the_first_line_is_the_first_with_something_in_it():
    assert release_scores.first_line("\n  \n Ann \nBo") == "Ann"
    assert release_scores.first_line(" \n") == ""


def test_where_the_two_ways_of_scoring_part():
    assert (exact_match("co-founder", "cofounder"), release_scores.exact_match("co-founder", "cofounder")) == (1, 0)
    assert (exact_match("co-founder", "co founder"), release_scores.exact_match("co-founder", "co founder")) == (0, 1)
    wrong_label = mab_scores.text_scores("label: 17", ["7"])
    assert (wrong_label["exact_match"], release_scores.contains("label: 17", ["7"])) == (0, 1)
    half = ["he left", "she stayed"]
    assert (mab_scores.all_parts("He left.", half), release_scores.contains("He left.", half)) == (0, 1)


@given(st.text(max_size=40), st.text(max_size=40))
def test_f1_is_symmetric_bounded_and_1_for_an_exact_match(left, right):
    value = release_scores.f1(left, right)
    assert 0 <= value <= 1 and value == release_scores.f1(right, left)
    assert not release_scores.exact_match(left, right) or value == 1


@given(st.text(max_size=30), st.text(max_size=10), st.text(max_size=10))
def test_a_reference_is_in_every_answer_that_says_it(reference, before, after):
    if release_scores.words(reference):
        assert release_scores.contains(f"{before} {reference} {after}", [reference])
