"""HotpotQA's loader and scores, against its authors' definition and the real data."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.benchmarks import get_benchmark
from pipelines.benchmarks.answer_f1 import answer_tokens
from pipelines.benchmarks.hotpotqa import answer_f1, exact_match
from pipelines.config.benchmarks import HotpotqaSettings
from pipelines.errors import StageError
from tests.paths import DATA

REAL = DATA / "hotpotqa" / "hotpot_dev_distractor_300.json"

RECORD = {
    "_id": "q1",
    "question": "Are both public? ",
    "answer": "no",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["A", 0]],
    "context": [["A", ["A is public.", " It is old."]], ["Empty", []], ["B", [" B is not."]]],
}


def benchmark(path, **changes):
    return get_benchmark("h", HotpotqaSettings(kind="hotpotqa", version=1, file=str(path), **changes))


@pytest.fixture
def made_up(tmp_path):
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([RECORD, RECORD | {"_id": "q2", "type": "bridge", "answer": "B"}]))
    return path


def test_a_question_has_its_passages_as_history(made_up):
    first, second = benchmark(made_up).contexts()
    assert [message["content"] for message in first.history] == [
        "Passage 1 - A:\nA is public. It is old.",
        "Passage 2 - B:\nB is not.",
    ]
    (question,) = first.questions
    assert question.messages[-1]["content"].endswith("\n\nQuestion: Are both public?\nAnswer:")
    assert (question.references, question.category, question.cluster_id) == (["no"], "comparison", "q1")
    assert second.questions[0].category == "bridge"


def test_the_hubs_columns_make_the_same_context(made_up, monkeypatch):
    import datasets

    columns = {
        "title": [title for title, _ in RECORD["context"]],
        "sentences": [sentences for _, sentences in RECORD["context"]],
    }
    row = {key: value for key, value in RECORD.items() if key != "_id"} | {"id": "q1", "context": columns}
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = HotpotqaSettings(kind="hotpotqa", version=1, hub_revision="abc")
    (from_hub,) = get_benchmark("h", settings).contexts()
    assert from_hub == next(iter(benchmark(made_up).contexts()))
    assert asked == [(("hotpotqa/hotpot_qa", "distractor"), {"split": "validation", "revision": "abc"})]


def test_without_the_hub_it_says_what_to_do(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(StageError, match="no route.*hotpot_dev_distractor_v1.json as 'file'"):
        list(get_benchmark("h", HotpotqaSettings(kind="hotpotqa", version=1)).contexts())


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('[{"question": "?"}]')
    with pytest.raises(StageError, match="other.json, question 0: not a HotpotQA question"):
        list(benchmark(path).contexts())


@pytest.mark.parametrize(
    "reference, prediction, em, f1",
    [
        ("Tulsa", "Tulsa", 1, 1),
        ("Tulsa", "The Tulsa!", 1, 1),
        ("Tulsa", "Tulsa, Oklahoma", 0, 2 / 3),
        ("no", "No.", 1, 1),
        ("no", "No, they are not", 0, 0),  # closed answers match as a whole or not at all
        ("yes", "no", 0, 0),
        ("yes sir", "yes", 0, 0),
        ("noanswer", "no answer", 0, 0),
        ("Tulsa", "", 0, 0),
        ("the", "", 1, 0),  # both are empty once articles are gone: the script's EM is 1, its F1 0
        ("Beyoncé", "beyoncé", 1, 1),
        ("1,800", "1800", 1, 1),
        ("Tulsa", "Tulsa\nIt is in Oklahoma.", 1, 1),  # the first line is the answer
        ("Tulsa", "\n  Tulsa ", 1, 1),
        ("a b c b", "b b", 0, 2 * 2 / (2 + 3)),  # bags of tokens, without the article
    ],
)
def test_scores_by_hand(made_up, reference, prediction, em, f1):
    hotpot = benchmark(made_up)
    question = next(hotpot.contexts()).questions[0]
    question = type(question)(**{**vars(question), "references": [reference]})
    assert hotpot.score(question, prediction) == {"exact_match": em, "f1": pytest.approx(f1)}


def test_the_release_scores_the_first_line_by_its_own_words(made_up):
    hotpot = benchmark(made_up, protocol="release")
    question = next(hotpot.contexts()).questions[0]
    assert hotpot.score(question, "\n No! \nThey aren't.") == {"exact_match": 1, "f1": 1}
    assert hotpot.score(question, "No, they are not") == {"exact_match": 0, "f1": pytest.approx(2 / 5)}


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_are_symmetric_bounded_and_exact_match_implies_f1(left, right):
    assert exact_match(left, right) == exact_match(right, left)
    value = answer_f1(left, right)
    assert 0 <= value <= 1
    assert value == answer_f1(right, left)
    if exact_match(left, right) and answer_tokens(left):
        assert value == 1.0


@pytest.mark.skipif(not REAL.exists(), reason="HotpotQA's file is not at hand")
def test_the_real_file():
    hotpot = benchmark(REAL)
    contexts = list(hotpot.contexts())
    questions = [question for context in contexts for question in context.questions]
    assert Counter(question.category for question in questions) == {"bridge": 230, "comparison": 70}
    assert Counter(len(context.history) for context in contexts) == {10: 297, 2: 1, 6: 1, 9: 1}
    assert all(hotpot.score(q, q.references[0]) == {"exact_match": 1, "f1": 1} for q in questions)
