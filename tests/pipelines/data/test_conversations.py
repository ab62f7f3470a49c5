"""Conversations: facts told as a person would, asked for in other words, and nothing of the evaluation in training."""

import hashlib
import itertools
import json
import re

import pytest

from pipelines.data.conversations import _texts, conversations, ordinary_turns, values


def said(conversation):
    return [m["content"] for m in conversation["messages"] if m["role"] == "user"]


@pytest.fixture(scope="module", params=["train", "eval", "unseen"])
def many(request):
    unseen = request.param == "unseen"
    return list(conversations(400, 3, "eval" if unseen else request.param, unseen=unseen))


def test_every_fact_is_told_once_and_its_answer_is_a_sentence_with_the_value(many):
    for conversation in many:
        told = " ".join(said(conversation))
        for fact in conversation["facts"]:
            assert fact["value"].lower() in told.lower()
            capital = fact["value"][0].upper() + fact["value"][1:]
            assert fact["value"] in fact["answer"] or fact["answer"].startswith(capital)
            assert fact["answer"].endswith(".") and fact["question"][-1] in "?.!"
            assert fact["value"].lower() not in fact["question"].lower().split()


def test_turns_are_a_user_s_message_and_a_reply(many):
    for conversation in many:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_every_turn_tells_a_fact_that_names_it_or_is_an_ordinary_one(many):
    for conversation in many:
        telling = {fact["told_in"] for fact in conversation["facts"]}
        for fact in conversation["facts"]:
            assert fact["value"].lower() in conversation["messages"][fact["told_in"]]["content"].lower()
        others = [text for turn, text in enumerate(said(conversation)) if 2 * turn not in telling]
        assert len(others) + len(telling) == len(said(conversation))
        assert set(others) <= {text for split in ("train", "eval") for text, _ in ordinary_turns(split)}


def test_questions_of_a_conversation_have_different_answers(many):
    for conversation in many:
        found = [fact["value"] for fact in conversation["facts"]]
        questions = [fact["question"] for fact in conversation["facts"]] + [conversation["unknown"]["question"]]
        assert len(set(found)) == len(found) in range(1, 7)
        assert len(set(questions)) == len(questions)


def test_no_place_is_left_unfilled_and_sentences_begin_in_capitals(many):
    for conversation in many:
        texts = [m["content"] for m in conversation["messages"]]
        texts += [text for fact in conversation["facts"] for text in (fact["question"], fact["answer"])]
        assert not [text for text in texts if re.search(r"[{}]", text) or text[0].islower()]


def test_kinds_of_facts_are_those_of_the_split_and_unseen_ones_are_no_others():
    def told(split, unseen):
        drawn = conversations(2000, 3, split, unseen=unseen)
        return {fact["kind"] for conversation in drawn for fact in conversation["facts"]}

    trained, asked, unseen = told("train", False), told("eval", False), told("eval", True)
    assert len(trained) == 293 and len(asked) == 45 and asked < trained
    assert len(unseen) == 16 and not unseen & trained
    texts = _texts()
    assert {kind for group in texts["alike"] for kind in group} == set(texts["kinds"]) == trained | unseen
    with pytest.raises(ValueError, match="no kind of fact is unseen in training"):
        next(conversations(1, 3, "train", unseen=True))


def test_what_is_asked_in_evaluation_is_what_it_was():
    asked = json.dumps(list(conversations(50, 42, "eval", (1, 6), 4)), ensure_ascii=False)
    assert hashlib.sha256(asked.encode()).hexdigest()[:16] == "a447880dc84302a6"


def test_what_a_person_says_in_evaluation_never_occurs_in_training():
    sets = [list(conversations(2000, 0, split)) for split in ("train", "eval")]
    for key in ("value", "question"):
        train, held_out = ({fact[key] for c in part for fact in c["facts"]} for part in sets)
        assert held_out and not train & held_out
    train, held_out = ({text for c in part for text in said(c)} for part in sets)
    assert not train & held_out


def test_no_phrasing_is_of_both_splits():
    texts = _texts()
    lists = [kind[key] for kind in texts["kinds"].values() for key in ("tell", "ask")]
    lists += [texts[key] for key in ("tell_frames", "ask_frames", "topic_frames")]
    train, held_out = ({text.lower() for part in lists for text in part.get(split, ())} for split in ("train", "eval"))
    assert held_out and not train & held_out
    train, held_out = ({said.lower() for said, _ in ordinary_turns(split)} for split in ("train", "eval"))
    assert held_out and not train & held_out


@pytest.mark.parametrize("pool", ["first_name", "city", "job", "dish", "code", "date"])
def test_values_are_split_whatever_pool_they_stand_in(pool):
    train, held_out = (set(values(pool, split)) for split in ("train", "eval"))
    assert not train & held_out and len(held_out) > 10
    assert 0.12 < len(held_out) / len(train | held_out) < 0.4


def test_the_number_of_facts_and_of_turns_after_them_can_be_set():
    for conversation in conversations(50, 1, "eval", (3, 3), turns_after=4):
        ordinary = {text for text, _ in ordinary_turns("eval")}
        assert len(conversation["facts"]) == 3
        assert all(text in ordinary for text in said(conversation)[-4:])


def test_the_same_seed_gives_the_same_and_a_longer_run_begins_alike():
    some = list(conversations(20, 7, "train"))
    assert list(itertools.islice(conversations(500, 7, "train"), 20)) == some
    assert list(conversations(20, 8, "train")) != some
