"""Records that a benchmark's data have twice, under one id, or with damaged text."""

from dataclasses import replace

from pipelines.benchmarks.base import Context, Question
from pipelines.evaluation.intake import Intake, told


def context(context_id, text, *asked):
    questions = [Question(number, context_id, [{"role": "user", "content": words}], ["yes"]) for number, words in asked]
    return Context(context_id, [{"role": "user", "content": text}], questions)


ONE = context("a", "The cat is red.", ("q", "What is red?"))
OTHER = context("a", "The dog is blue.", ("q", "What is blue?"))


def test_data_without_duplicates_stay_as_they_are():
    contexts = [ONE, context("b", "The dog is blue.", ("r", "What is red?"))]
    found = Intake.of(contexts)
    assert found.contexts == contexts
    assert found.note() == {}


def test_the_same_record_twice_is_asked_once():
    found = Intake.of([ONE, OTHER, ONE])
    assert [c.history for c in found.contexts] == [ONE.history, OTHER.history]
    assert list(found.repeated) == ["a"]
    twice = replace(ONE, questions=[*ONE.questions, *ONE.questions])
    assert Intake.of([twice]).contexts == [ONE]


def test_different_records_with_one_id_are_all_kept():
    found = Intake.of([ONE, OTHER, context("a#2", "The fox is black.", ("q#2", "What is black?"))])
    assert [c.context_id for c in found.contexts] == ["a", "a#2", "a#2#2"]
    assert [q.question_id for c in found.contexts for q in c.questions] == ["q", "q#2", "q#2#2"]
    assert list(found.renamed) == ["q", "a", "q#2", "a#2"]
    assert list(told(found.note())) == [
        "q, a, q#2 and 1 more: id of different records; all but the first get a number after theirs"
    ]


def test_different_questions_with_one_id_about_one_history_are_all_kept():
    found = Intake.of([context("a", "Cats.", ("q", "Who?"), ("q", "Where?"), ("q", "Who?"))])
    assert [(q.question_id, q.query) for q in found.contexts[0].questions] == [("q", "Who?"), ("q#2", "Where?")]
    assert (list(found.repeated), list(found.renamed)) == (["q"], ["q"])


def test_half_a_character_is_replaced_wherever_it_stands():
    found = Intake.of([ONE, context("b", "The cat \ud83d is red.", ("r\udc00", "What is \ud83d red?"))])
    mended = found.contexts[1]
    assert mended.history[0]["content"] == "The cat \ufffd is red."
    assert (mended.questions[0].question_id, mended.questions[0].query) == ("r\ufffd", "What is \ufffd red?")
    assert found.contexts[0] == ONE and found.note() == {"mended": ["b"]}
    assert list(told(found.note())) == ["b: half characters (lone surrogates) in the text; replaced by U+FFFD"]
