"""Conversations as a source: what was told is written, each fact is an exercise of its own."""

import json
import re

import pytest

from pipelines.config.data import ConversationsSource
from pipelines.data.conversations import ordinary_turns
from pipelines.data.sources import load_corpus


@pytest.fixture
def load(tmp_path):
    def load(split="train", **settings):
        keys = {"train_conversations": 40, "eval_conversations": 20, **settings}
        return load_corpus(ConversationsSource(kind="conversations", **keys), split, tmp_path)

    return load


@pytest.fixture
def answers_in_squad(tmp_path):
    """A file in SQuAD's form whose questions have these answers."""

    def write(*answers):
        text = " ".join(answers)
        asked = [{"id": a, "question": "?", "answers": [{"text": a, "answer_start": text.index(a)}]} for a in answers]
        file = tmp_path / "squad.json"
        file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": text, "qas": asked}]}]}))
        return [str(file)]

    return write


def says(sentence, value):
    """Whether an answer has a value, which as its beginning it writes with a capital."""
    return value in sentence or sentence.startswith(value[0].upper() + value[1:])


def test_a_question_is_read_without_the_turns_that_told_it(load):
    for document in load().documents:
        assert document.messages and {m["role"] for m in document.messages} == {"user", "assistant"}
        for exercise in document.exercises:
            assert [message["role"] for message in exercise.prompt] == ["user"]
            if exercise.kind == "told":
                sentence, value = exercise.references
                assert says(sentence, value)


def test_the_share_of_questions_for_what_was_not_told_is_kept(load):
    for share, expected in ((0.0, 0), (0.25, 10), (1.0, 40)):
        kinds = [e.kind for d in load(unknown_share=share).documents for e in d.exercises]
        assert kinds.count("unknown") == expected and "told" in kinds


def test_evaluation_does_not_change_with_the_training_conversations(load):
    held_out = list(load("eval").documents)
    assert held_out == list(load("eval", train_conversations=80).documents)
    assert held_out != list(load("eval", seed=1).documents)
    facts = [sum(e.kind == "told" for e in d.exercises) for d in load("train", max_facts=2).documents]
    assert set(facts) == {1, 2}


def test_replies_are_learnt_with_the_turns_before_them_written(load):
    whole = {d.document_id: d for d in load().documents}
    replies = [d for d in load(reply_share=0.5).documents if d.document_id.endswith("/reply")]
    assert 5 < len(replies) <= 20 and not [
        d for d in load("eval", reply_share=1.0).documents if "reply" in d.document_id
    ]
    for document in replies:
        (exercise,) = document.exercises
        messages = whole[document.document_id.removesuffix("/reply")].messages
        turn = [*exercise.prompt, {"role": "assistant", "content": exercise.references[0]}]
        assert messages[: len(document.messages) + 2] == document.messages + turn and document.messages


def test_replies_to_small_talk_that_has_a_value_in_it_are_not_learnt(load, answers_in_squad):
    common = answers_in_squad("Meeting", "Traffic", "Phone", "Coffee", "Report", "Tired")
    documents = load(train_conversations=300, new_values=1.0, reply_share=1.0, word_files=common).documents
    ordinary = {said for said, _ in ordinary_turns("train")}
    replies = [e for d in documents for e in d.exercises if e.kind == "reply"]
    assert len(replies) > 100 and not [e for e in replies if e.prompt[0]["content"] in ordinary]
    talked = [" ".join(m["content"] for m in d.messages if m["content"] in ordinary).lower() for d in documents]
    told = [[e.references[1].lower() for e in d.exercises if e.kind == "told"] for d in documents]
    assert any(value in talk for talk, values in zip(talked, told, strict=True) for value in values)


def test_new_values_are_told_and_asked_for_in_training_alone(load, answers_in_squad):
    files = answers_in_squad("Zanzibar", "a quokka", "Loch Ness")

    def told(split, **settings):
        documents = load(split, train_conversations=200, word_files=files, **settings).documents
        return [(d, e) for d in documents for e in d.exercises if e.kind == "told"]

    for document, exercise in told("train", new_values=1.0):
        sentence, value = exercise.references
        assert says(sentence, value) and value.lower() in " ".join(m["content"] for m in document.messages).lower()
    new, old = (
        {e.references[1] for _, e in told("train", new_values=share) if not re.search(r"\d", e.references[1])}
        for share in (1.0, 0.0)
    )
    assert {"Zanzibar", "Loch Ness"} <= new and any("quokka" in value for value in new)
    assert len(new & old) < 0.1 * len(new)
    assert told("eval") == told("eval", new_values=1.0)
