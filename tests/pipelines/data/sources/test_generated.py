"""Facts told in a conversation or as one text: every fact, nothing else of the paper, the same each time."""

import pytest

from pipelines.config.data import GeneratedSource
from pipelines.data.sources import load_corpus


@pytest.fixture
def load(tmp_path):
    def load(told, split="train", **settings):
        keys = {"train_papers": 30, "eval_papers": 5, "facts_per_paper": 4, **settings}
        return load_corpus(GeneratedSource(kind="generated", told=told, **keys), split, tmp_path / "generated")

    return load


def test_a_conversation_tells_a_papers_facts_and_is_asked_its_questions(load):
    papers, conversations = load("paper").documents, load("conversation").documents
    assert [d.exercises for d in papers] == [d.exercises for d in conversations]
    for paper, conversation in zip(papers, conversations, strict=True):
        roles = [message["role"] for message in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        told = " ".join(m["content"] for m in conversation.messages if m["role"] == "user").lower()
        written = " ".join(m["content"] for m in paper.messages).lower()
        facts = [f"is {e.references[0]}.".lower() for e in paper.exercises if e.kind == "extractive"]
        assert len(facts) == 4 and all(fact in told and fact in written for fact in facts)
        assert told.count(" of ") == 4 and "report" not in told
        assert conversation.noun == "conversation"


def test_the_same_settings_give_the_same_conversations_and_other_seeds_others(load):
    conversations = list(load("conversation").documents)
    assert conversations == list(load("conversation").documents)
    assert conversations != list(load("conversation", seed=1).documents)
    assert {d.document_id for d in conversations}.isdisjoint(
        d.document_id for d in load("conversation", "eval").documents
    )


def test_a_text_tells_facts_and_nothing_else_of_the_numbers_wanted_in_turns(load):
    numbers = [1, 2, 8]
    papers, texts = (load(told, facts_per_paper=numbers).documents for told in ("paper", "text"))
    for place, (paper, text) in enumerate(zip(papers, texts, strict=True)):
        count = numbers[place % 3]
        assert len(text.exercises) == count and text.exercises == paper.exercises[:count]
        (message,) = text.messages
        told = message["content"].split(". ")
        assert len(told) == count
        for exercise, fact in zip(text.exercises, told, strict=True):
            assert fact.removesuffix(".").endswith(f" is {exercise.references[0]}")
