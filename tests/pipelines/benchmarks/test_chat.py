"""Chats: what is told is asked for without being told again, scored by its value; ordinary requests are new ones."""

import pytest

from pipelines.benchmarks import get_benchmark
from pipelines.benchmarks.base import Question
from pipelines.benchmarks.chat_recall import is_sentence
from pipelines.config.benchmarks import ChatRecallSettings, ChatRepliesSettings
from pipelines.data.conversations import conversations


def recall(**changes):
    return get_benchmark("chat", ChatRecallSettings(kind="chat_recall", version=1, **changes))


@pytest.fixture(scope="module")
def contexts():
    return list(recall(facts=[1, 4], turns_after=[0, 1, 8], conversations=6).contexts())


def test_every_fact_is_asked_for_after_so_many_turns(contexts):
    categories = [f"{facts}{later}" for facts in ("1 fact", "4 facts")
                  for later in ("", ", 1 turn later", ", 8 turns later")]  # fmt: skip
    assert [c.questions[0].category for c in contexts] == [name for name in categories for _ in range(6)]
    for context in contexts:
        assert len(context.questions) == int(context.questions[0].category[0])
        for question in context.questions:
            assert question.extra["value"] in question.references[0]
            assert question.messages not in [[message] for message in context.history]


def test_more_turns_follow_on_the_same_conversation(contexts):
    soon, later = contexts[6:7] + contexts[18:24], contexts[12:13] + contexts[30:36]
    assert [c.questions[0].cluster_id for c in soon] == [c.questions[0].cluster_id for c in later]
    by_cluster = {}
    for context in contexts:
        by_cluster.setdefault(context.questions[0].cluster_id, []).append(context)
    for same in by_cluster.values():
        none, one, eight = same
        assert one.history[: len(none.history)] == none.history and eight.history[: len(one.history)] == one.history
        assert len(eight.history) == len(none.history) + 16
        assert [q.messages for q in none.questions] == [q.messages for q in eight.questions]


def test_ids_are_unique_and_nothing_is_from_training(contexts):
    ids = [question.question_id for context in contexts for question in context.questions]
    assert len(set(ids)) == len(ids) and len({c.context_id for c in contexts}) == len(contexts)
    trained = {fact["value"] for told in conversations(300, 42, "train") for fact in told["facts"]}
    assert not trained & {q.extra["value"] for c in contexts for q in c.questions}


@pytest.mark.parametrize(
    ("value", "said", "recalled", "sentence"),
    [
        ("Lisbon", "You told me you live in Lisbon.", 1, 1),
        ("Lisbon", "lisbon", 1, 0),
        ("Rex", "Your dog is called Rexford.", 0, 1),
        ("a dentist", "You are the dentist!", 1, 1),
        ("5:15 in the morning", "It starts at 5:15 in the afternoon.", 0, 1),
        ("on the windowsill", "You keep it on the windowsill", 1, 0),
        ("Oak Street", "Your house is on Oak.", 0, 1),
        ("Rex", "", 0, 0),
    ],
)
def test_an_answer_is_right_that_says_the_value_as_words_of_its_own(value, said, recalled, sentence):
    question = Question("q", "c", [{"role": "user", "content": "?"}], ["x"], extra={"value": value})
    assert recall().score(question, said) == {"recalled": recalled, "in_sentences": sentence}


def test_what_the_conversations_answer_counts_as_a_sentence(contexts):
    assert all(is_sentence(q.references[0]) for c in contexts for q in c.questions)


def test_requests_are_not_said_in_the_conversation_and_wait_for_the_backbone_s_replies():
    settings = ChatRepliesSettings(kind="chat_replies", version=1, conversations=10, requests=3, max_new_tokens=40)
    benchmark = get_benchmark("replies", settings)
    contexts = list(benchmark.contexts())
    assert benchmark.max_new_tokens == 40 and len(contexts) == 10
    for context in contexts:
        said = [message["content"] for message in context.history]
        asked = [question.messages[0]["content"] for question in context.questions]
        assert len(set(asked)) == 3 and not set(asked) & set(said)
        assert all(question.references == [] for question in context.questions)
    question = Question("q", "c", [{"role": "user", "content": "?"}], ["A byte is eight bits."])
    assert benchmark.score(question, "A byte is eight bits.") == {"f1": 1.0}
