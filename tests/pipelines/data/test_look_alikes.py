"""Values that look like others."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.conversations import _pool, _texts
from pipelines.data.look_alikes import Words, look_alike

WORDS = Words(names=["Kofi Annan", "Zanzibar"], others=["quokka", "coal mine"])
VALUES = sorted({value for kind in _texts()["kinds"].values() for value in _pool(kind["pool"])[:40]})


@given(st.sampled_from(VALUES), st.integers(0, 2**32), st.sampled_from([WORDS, Words()]))
def test_they_have_the_form_of_the_value(value, seed, words):
    new = look_alike(random.Random(seed), value, words)
    assert new and new == new.strip()
    if any(c.isdigit() for c in value):
        assert [c.isdigit() for c in value.split(" ", 1)[-1]] == [c.isdigit() for c in new.split(" ", 1)[-1]]
    else:
        assert new[0].isupper() == (value[0].isupper() or value.split()[-1][0].isupper()) or new.split()[0] in value
    assert not any(part.startswith("0") for part in new.split() if part.isdigit() and not value.startswith("0"))


def test_the_same_draw_gives_the_same():
    assert [look_alike(random.Random(7), "a dentist", WORDS) for _ in range(3)] == [
        look_alike(random.Random(7), "a dentist", WORDS)
    ] * 3


@pytest.mark.parametrize("value", ["a dentist", "in the attic"])
def test_an_article_or_a_preposition_stays(value):
    for seed in range(20):
        assert look_alike(random.Random(seed), value, WORDS).startswith(value.rsplit(" ", 1)[0] + " ")


def test_words_are_drawn_from_short_answers():
    words = Words.of(
        ["the Loch Ness", "Loch Ness", "a quokka", "Berlin", "12 apples", "Ünal", "an", "more than three words here"]
    )
    assert words == Words(names=["Berlin", "Loch Ness"], others=["quokka", "Loch Ness"])
