"""BM25 retrieval: what it leaves of a history."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmarks import Context
from pipelines.config.strategies import Bm25Strategy
from pipelines.strategies.passages import Index, best
from pipelines.strategies.retrieval import Bm25
from tests.stories import STORY, context, no_summaries, texts


def test_bm25_gives_every_question_the_passages_that_share_its_words():
    settings = Bm25Strategy(kind="bm25", top_k=1, passage_characters=1000)
    car, lake = Bm25(settings, no_summaries, "cpu")(context("What colour is the car?", "Who went sailing?"))
    assert texts(car) == [STORY[1]]
    assert texts(lake) == [STORY[2]]
    assert (car.context_id, [q.question_id for q in car.questions]) == ("q0", ["q0"])
    assert car.questions[0].cluster_id == "doc"


def test_a_long_message_is_cut_under_its_first_line_and_order_is_kept():
    settings = Bm25Strategy(kind="bm25", top_k=2, passage_characters=120)
    (made,) = Bm25(settings, no_summaries, "cpu")(context("Tiger cat, red car?"))
    first, second = texts(made)
    assert first.startswith("DATE: 1 May\n") and first.endswith("The cat is called Tiger.")
    assert second == STORY[1]


def test_the_scores_are_okapis():
    documents = ["a b", "a c c", "d"]
    found = Index([{"role": "user", "content": text} for text in documents], 100).relevance("c d")
    average = 2.0
    for number, word, count in ((1, "c", 2), (2, "d", 1)):
        idf = math.log((3 - 1 + 0.5) / (1 + 0.5))
        length = len(documents[number].split())
        expected = idf * count * 2.5 / (count + 1.5 * (1 - 0.75 + 0.75 * length / average))
        assert found[number] == pytest.approx(expected), word
    assert found[0] == 0


@pytest.mark.parametrize("history", [[], [{"role": "user", "content": "  "}], [{"role": "user", "content": "?!"}]])
def test_a_history_without_words_is_no_problem(history):
    made = context("Who?")
    empty = Context("c", history, made.questions)
    (found,) = Bm25(Bm25Strategy(kind="bm25"), no_summaries, "cpu")(empty)
    assert "".join(texts(found)) == "".join(m["content"].strip() for m in history)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), st.integers(1, 6))
def test_the_best_are_the_highest_in_their_order(scores, count):
    chosen = best(np.array(scores), count)
    assert chosen == sorted(chosen)
    assert sorted((scores[n] for n in chosen), reverse=True) == sorted(scores, reverse=True)[:count]
