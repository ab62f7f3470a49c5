"""LoCoMo's prompts, dates and scores, against its authors' definitions and the real data."""

import json
import random
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem import PorterStemmer

from pipelines.benchmarks import Question, get_benchmark
from pipelines.benchmarks.locomo import (
    CATEGORIES,
    clean_answer,
    conversation_messages,
    multi_answer_f1,
    stemmed_f1,
    stemmed_tokens,
)
from pipelines.config.benchmarks import LocomoSettings
from pipelines.errors import StageError
from tests.paths import DATA

REAL = DATA / "locomo" / "locomo10.json"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="LoCoMo's own file is not at hand")

TURNS = [
    {"speaker": "Ann", "dia_id": "D1:1", "text": "I got a dog."},
    {"speaker": "Bo", "dia_id": "D1:2", "text": "Look!", "blip_caption": "a photo of a cat"},
]
CONVERSATION = {
    "speaker_a": "Ann",
    "speaker_b": "Bo",
    "session_10_date_time": "5:00 pm on 2 June, 2023",
    "session_10": [{"speaker": "Bo", "dia_id": "D10:1", "text": "Bye."}],
    "session_2_date_time": "1:56 pm on 8 May, 2023",
    "session_2": TURNS,
    "session_3_date_time": "9:00 am on 9 May, 2023",
    "session_3": [],
    "session_4_date_time": "9:00 am on 10 May, 2023",
}
QUESTIONS = [
    {"question": "What pets?", "answer": "dog, cat", "category": 1},
    {"question": "When?", "answer": 2022, "category": 2},
    {"question": "Would she?", "answer": "Likely no; she has a dog", "category": 3},
    {"question": "Who left?", "answer": "Bo", "category": 4},
    {"question": "Whose car?", "adversarial_answer": "Ann's", "category": 5},
    {"question": "Is it Bo's?", "adversarial_answer": "Yes", "answer": "No", "category": 5},
]


def benchmark(path, **changes):
    settings = LocomoSettings(kind="locomo", version=1, file=str(path), **changes)
    return get_benchmark("locomo", settings)


@pytest.fixture
def made_up(tmp_path):
    path = tmp_path / "locomo.json"
    record = {"sample_id": "conv-1", "conversation": CONVERSATION, "qa": QUESTIONS}
    path.write_text(json.dumps([record]), encoding="utf-8")
    return path


def asked(category, reference, options=None):
    return Question("q", "c", [], [reference], CATEGORIES[category], {"options": options or {}})


def score(category, reference, prediction, options=None):
    question = asked(category, reference, options)
    return benchmark("unused").score(question, prediction)["f1"]


# --- history and questions ------------------------------------------------------------------------------


def test_sessions_come_in_order_of_their_number_with_their_dates_and_pictures():
    opening, first, last = conversation_messages(CONVERSATION, by_turn=False)
    assert opening["content"].startswith("Below is a conversation between two people: Ann and Bo.")
    assert first["content"] == (
        "DATE: 1:56 pm on 8 May, 2023\nCONVERSATION:\n"
        'Ann said, "I got a dog."\nBo said, "Look!" and shared a photo of a cat.'
    )
    assert last["content"] == 'DATE: 5:00 pm on 2 June, 2023\nCONVERSATION:\nBo said, "Bye."'


def test_by_turn_every_turn_has_its_date():
    messages = conversation_messages(CONVERSATION, by_turn=True)
    assert len(messages) == 4
    assert all(message["content"].startswith("DATE: ") for message in messages[1:])


def test_questions_are_asked_by_the_rules_of_their_category(made_up):
    (context,) = benchmark(made_up, categories=[1, 2, 3, 4, 5]).contexts()
    texts = [question.messages[-1]["content"] for question in context.questions]
    assert [q.references for q in context.questions][:4] == [["dog, cat"], ["2022"], ["Likely no"], ["Bo"]]
    assert texts[0].endswith("\n\nQuestion: What pets?")
    assert texts[1].endswith("When? Use DATE of CONVERSATION to answer with an approximate date.")
    for question, text, wrong in zip(context.questions[4:], texts[4:], ["Ann's", "No"], strict=True):
        options = question.extra["options"]
        assert sorted(options.values()) == sorted(["No information available", wrong])
        assert f"(a) {options['a']} (b) {options['b']}. Select the correct answer" in text
        letter = "a" if options["a"] == "No information available" else "b"
        assert question.references == [f"({letter})"]
    assert {question.messages[0]["role"] for question in context.questions} == {"system"}


def test_category_5_is_left_out_unless_asked_for_and_limits_hold(made_up):
    (context,) = benchmark(made_up).contexts()
    assert [q.category for q in context.questions] == ["multi_hop", "temporal", "open_domain", "single_hop"]
    (context,) = benchmark(made_up, max_questions=2).contexts()
    assert [q.question_id for q in context.questions] == ["conv-1/0", "conv-1/1"]


@pytest.mark.parametrize(
    "text, said", [("{", "not JSON"), ('[{"qa": []}]', "conversation 0: not a LoCoMo conversation")]
)
def test_a_file_that_is_not_locomo_is_named(tmp_path, text, said):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(StageError, match=said) as caught:
        list(benchmark(path).contexts())
    assert str(path) in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(StageError, match="can't be read.*Fetch the data"):
        list(benchmark(tmp_path / "none.json").contexts())


# --- scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "category, reference, prediction, expected",
    [
        (4, "self-care is important", "Self care is important", 4 / 7),  # selfcare is one word
        (4, "painting sunsets", "She paints a sunset.", 0.8),  # paint sunset / she paint sunset
        (4, "the cat and a dog", "cat dog", 1.0),  # articles and "and" don't count
        (4, "Zoë's café", "zoë's café!", 1.0),
        (4, "7 May 2023", "May 7, 2023", 1.0),
        (4, "2", "two", 0.0),
        (4, "yes", "", 0.0),
        (4, "the", "the", 0.0),  # nothing is left to compare
        (4, "yes", "Answer: Yes\nbecause she said so", 1.0),
        (2, "2022", "in 2022", 2 / 3),
        (3, "Likely no", "likely no; as she has a dog", 2 * 2 / (2 + 6)),
        (1, "dog, cat", "cat, dog", 1.0),
        (1, "dog, cat", "dog", 0.5),
        (1, "dog, cat", "a cat and a dog", 2 / 3),  # one part against each: 2·1/(2 + 1)
        (1, "dog, cat,", "dog, cat", 2 / 3),  # an empty part of the reference can't be found
        (1, "dog", "dog, cat, bird", 1.0),  # extra parts cost nothing
        (4, "dog, cat", "dog", 2 / 3),  # commas part answers to multi-hop questions only
    ],
)
def test_f1_by_hand(category, reference, prediction, expected):
    assert score(category, reference, prediction) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("(a)", 1.0),
        ("The answer is (A).", 1.0),
        ("(b)", 0.0),
        ("Ann's", 0.0),  # without a letter the authors take (b)
        ("", 0.0),
    ],
)
def test_adversarial_questions_are_right_where_no_answer_is_chosen(prediction, expected):
    options = {"a": "No information available", "b": "Ann's"}
    assert score(5, "(a)", prediction, options) == expected
    flipped = {"a": "Ann's", "b": "No information available"}
    if prediction in ("(a)", "(b)"):
        assert score(5, "(b)", prediction, flipped) == 1 - expected


def test_answers_are_cleaned_as_the_authors_do():
    assert clean_answer('  Answer: (a) The \\"Dog\\"\nand more', {}) == "the 'dog'"
    assert clean_answer("", {}) == ""


def official_f1(prediction, reference):
    """The definition, step by step as evaluation.py has it."""
    stemmer = PorterStemmer()

    def tokens(text):
        text = "".join(ch for ch in text.replace(",", "").lower() if ch not in string.punctuation)
        words = [w for w in text.split() if w not in ("a", "an", "the", "and")]
        return [stemmer.stem(w) for w in words]

    left, right = tokens(prediction), tokens(reference)
    same = sum((Counter(left) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(left), same / len(right)
    return 2 * precision * recall / (precision + recall)


plain_text = st.text(alphabet=string.ascii_letters + string.digits + " ,.'éß", max_size=40)


@given(plain_text, plain_text)
def test_f1_is_the_definition(prediction, reference):
    assert stemmed_f1(prediction, reference) == pytest.approx(official_f1(prediction, reference))


@given(st.text(max_size=60), st.text(max_size=60))
def test_f1_is_symmetric_bounded_and_1_for_the_same(left, right):
    value = stemmed_f1(left, right)
    assert 0 <= value <= 1
    assert value == stemmed_f1(right, left)
    assert stemmed_f1(left, left) == (1.0 if stemmed_tokens(left) else 0.0)


@given(st.lists(plain_text, min_size=1, max_size=4), st.randoms())
def test_the_order_of_parts_does_not_matter(parts, shuffle: random.Random):
    parts = [part.replace(",", "") for part in parts]
    mixed = shuffle.sample(parts, len(parts))
    assert multi_answer_f1(",".join(mixed), ",".join(parts)) == pytest.approx(
        sum(stemmed_f1(p, p) for p in parts) / len(parts)
    )


# --- the real file --------------------------------------------------------------------------------------


@needs_real
def test_the_real_file_is_complete():
    contexts = list(benchmark(REAL, categories=[1, 2, 3, 4, 5]).contexts())
    questions = [question for context in contexts for question in context.questions]
    counts = Counter(question.category for question in questions)
    assert len(contexts) == 10
    assert counts == {
        "multi_hop": 282,
        "temporal": 321,
        "open_domain": 96,
        "single_hop": 841,
        "adversarial": 446,
    }
    assert len({question.question_id for question in questions}) == 1986
    assert [len(context.history) for context in contexts] == [20, 20, 33, 30, 30, 29, 32, 31, 26, 31]
    assert all(message["content"].startswith("DATE: ") for c in contexts for message in c.history[1:])


@needs_real
def test_reference_answers_score_1_and_others_less():
    real = benchmark(REAL)
    (context,) = benchmark(REAL, max_contexts=1).contexts()
    right = [real.score(q, q.references[0])["f1"] for q in context.questions]
    assert min(right) == 1.0
    wrong = [real.score(q, "I do not know.")["f1"] for q in context.questions]
    assert sum(wrong) / len(wrong) < 0.05
