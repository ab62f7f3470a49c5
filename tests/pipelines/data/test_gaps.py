"""Gaps: words that only the text tells, shown among their neighbours."""

from pipelines.data.documents import Document, Exercise, Reading
from pipelines.data.gaps import BLANK, asked_for_gaps

TEXT = "In 1843 she met Bo of Lund. He was so kind. (Nobody remembered.) The end is at 7.30!"


def reading(*texts, exercises=()):
    documents = [Document(f"d{n}", [{"role": "user", "content": text}], list(exercises), "text")
                 for n, text in enumerate(texts)]  # fmt: skip
    return Reading(iter(documents), [], {})


def gaps(text, count=99):
    (document,) = asked_for_gaps(reading(text), count).documents
    return [(e.prompt[0]["content"].removeprefix("Fill in the blank: "), *e.references) for e in document.exercises]


def test_numbers_names_and_long_words_are_left_out_and_no_others():
    found = gaps(TEXT)
    assert sorted(word for _, word in found) == ["1843", "7.30", "Bo", "Lund", "remembered"]
    for shown, word in found:
        assert shown.count(BLANK) == 1 and shown.replace(BLANK, word) in TEXT
    long = " ".join(f"word{n}" for n in range(40))
    assert all(4 <= len(shown.split()) <= 13 for shown, _ in gaps(long) if not shown.startswith(("word0", BLANK)))


def test_so_many_are_drawn_and_always_the_same():
    assert len(gaps(TEXT, 2)) == 2 and gaps(TEXT, 2) == gaps(TEXT, 2)
    assert set(gaps(TEXT, 2)) <= set(gaps(TEXT))
    assert len([*asked_for_gaps(reading(TEXT, TEXT), 9).documents]) == 2


def test_they_come_after_the_questions_and_a_text_without_either_is_left_out():
    asked = Exercise("q", [{"role": "user", "content": "Who?"}], ["Bo"], "extractive")
    (document,) = asked_for_gaps(reading(TEXT, exercises=[asked]), 1).documents
    assert [e.question_id for e in document.exercises] == ["q", "d0/gap0"]
    assert not [*asked_for_gaps(reading("He was so kind."), 3).documents]
    plain = reading(TEXT)
    assert asked_for_gaps(plain, 0) is plain
