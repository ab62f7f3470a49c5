"""Conversations as a source: what was told is written, each fact is an exercise of its own."""

import pytest

from pipelines.config.data import ConversationsSource
from pipelines.data.sources import load_corpus


@pytest.fixture
def load(tmp_path):
    def load(split="train", **settings):
        keys = {"train_conversations": 40, "eval_conversations": 20, **settings}
        return load_corpus(ConversationsSource(kind="conversations", **keys), split, tmp_path)

    return load


def test_a_question_is_read_without_the_turns_that_told_it(load):
    for document in load().documents:
        assert document.messages and {m["role"] for m in document.messages} == {"user", "assistant"}
        for exercise in document.exercises:
            assert [message["role"] for message in exercise.prompt] == ["user"]
            if exercise.kind == "told":
                sentence, value = exercise.references
                assert value in sentence


def test_the_share_of_questions_for_what_was_not_told_is_kept(load):
    for share, expected in ((0.0, 0), (0.25, 10), (1.0, 40)):
        kinds = [e.kind for d in load(unknown_share=share).documents for e in d.exercises]
        assert kinds.count("unknown") == expected and "told" in kinds


def test_evaluation_does_not_change_with_the_training_conversations(load):
    assert load("eval").documents == load("eval", train_conversations=80).documents
    assert load("eval").documents != load("eval", seed=1).documents
    facts = [sum(e.kind == "told" for e in d.exercises) for d in load("train", max_facts=2).documents]
    assert set(facts) == {1, 2}
