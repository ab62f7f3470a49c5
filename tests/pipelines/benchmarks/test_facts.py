"""Papers of more and more facts: every answer is in its paper, once, and questions come from all of it."""

import pytest

from pipelines.benchmarks import get_benchmark
from pipelines.config.benchmarks import FactsSettings
from pipelines.data.generate import PROPERTIES


def facts(**changes):
    return get_benchmark("facts", FactsSettings(kind="facts", version=1, **changes))


@pytest.fixture(scope="module")
def contexts():
    return list(facts(facts=[1, 3, 20], papers=12).contexts())


def test_papers_of_each_number_of_facts(contexts):
    assert [c.questions[0].category for c in contexts] == ["1 fact"] * 12 + ["3 facts"] * 12 + ["20 facts"] * 12
    for context in contexts:
        told = int(context.questions[0].category.split()[0])
        text = "\n".join(message["content"] for message in context.history)
        assert sum(text.count(f"The {name} of ") for name in PROPERTIES) == told
        assert len(context.questions) == min(told, 4)


def test_an_answer_is_what_its_paper_says(contexts):
    ids = [question.question_id for context in contexts for question in context.questions]
    assert len(set(ids)) == len(ids) and len({c.context_id for c in contexts}) == len(contexts)
    for context in contexts:
        text = " ".join(message["content"] for message in context.history)
        for question in context.questions:
            (answer,) = question.references
            asked = question.messages[0]["content"]
            assert asked.replace("What is the", "The").replace("?", f" is {answer}.") in text
            assert question.cluster_id == context.context_id
            said = [f"{answer}.", f"It is {answer}.", "unknown"]
            scores = [facts().score(question, prediction) for prediction in said]
            assert [score["exact_match"] for score in scores] == [1.0, 0.0, 0.0]
            assert [score["substring_exact_match"] for score in scores] == [1.0, 1.0, 0.0]


def test_questions_come_from_the_whole_paper(contexts):
    places = [
        int(question.question_id.rsplit("q", 1)[1])
        for context in contexts[24:]
        for question in context.questions
    ]  # fmt: skip
    assert min(places) < 4 and max(places) > 15 and len(set(places)) > 12


def test_only_the_seed_changes_what_is_drawn():
    settings = {"facts": [2, 5], "papers": 4}
    first, again, other = (list(facts(**settings, seed=seed).contexts()) for seed in (1, 1, 2))
    assert first == again and first != other
    # another number of facts beside it changes nothing
    assert list(facts(facts=[5], papers=4, seed=1).contexts()) == first[4:]
