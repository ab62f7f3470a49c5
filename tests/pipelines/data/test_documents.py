"""Documents of any source: held out by groups, under ids of their own, with a system message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.documents import Document, Exercise, Reading, hold_out, read_whole, with_system_prompt
from pipelines.errors import StageError


def document(document_id="d", group="", questions=("q",), messages=({"role": "user", "content": "x"},)):
    exercises = [Exercise(name, [{"role": "user", "content": "?"}], ["!"], "reply") for name in questions]
    return Document(document_id, list(messages), exercises, "chat", group)


def reading(*documents):
    return Reading(iter(documents), [], {"files": []})


def ids(found):
    return [document.document_id for document in found.documents]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(lambda groups: len(set(groups)) > 1),
       st.floats(0.01, 0.99), st.randoms())  # fmt: skip
def test_the_splits_share_no_group_and_lose_nothing(groups, share, shuffle):
    documents = [document(str(number), group=f"g{group}") for number, group in enumerate(groups)]
    parts = {split: list(hold_out(reading(*documents), split, share).documents) for split in ("train", "eval")}
    of_split = {split: {d.group for d in found} for split, found in parts.items()}
    assert not of_split["train"] & of_split["eval"] and all(of_split.values())
    assert sorted(d.document_id for found in parts.values() for d in found) == sorted(map(str, range(len(groups))))
    shuffle.shuffle(documents)
    again = hold_out(reading(*documents), "eval", share)
    assert sorted(ids(again)) == sorted(d.document_id for d in parts["eval"])


def test_about_the_share_is_held_out_and_the_record_says_so():
    documents = [document(str(number)) for number in range(100)]
    held_out = hold_out(reading(*documents), "eval", 0.07)
    assert len(ids(held_out)) == 7 and held_out.origin["held_out"] == 0.07


def test_one_group_alone_cannot_be_held_out():
    with pytest.raises(StageError, match="none can be held out for evaluation; give eval_files"):
        hold_out(reading(document("a", "g"), document("b", "g")), "train", 0.5)


def test_repeated_ids_are_renamed_and_noted():
    found = read_whole(reading(document("d", questions=("q", "q")), document("d", questions=("q", "r"))))
    assert ids(found) == ["d", "d-2"] and found.renamed_documents == ["d-2"]
    asked = [exercise.question_id for document in found.documents for exercise in document.exercises]
    assert asked == ["q", "q-2", "q-3", "r"] and found.renamed_questions == ["q-2", "q-3"]


def test_a_system_message_is_written_and_read_unless_a_document_has_its_own():
    own = {"role": "system", "content": "own"}
    plain, with_own = document("a"), document("b", messages=(own, {"role": "user", "content": "x"}))
    first, second = with_system_prompt(reading(plain, with_own), "Be brief.").documents
    system = {"role": "system", "content": "Be brief."}
    assert first.messages == [system, *plain.messages] and first.exercises[0].prompt[0] == system
    assert second == with_own
    assert [*with_system_prompt(reading(plain), None).documents] == [plain]


def test_a_system_message_is_only_read_where_nothing_is_written():
    system = {"role": "system", "content": "Be brief."}
    (found,) = with_system_prompt(reading(document("a", messages=())), "Be brief.").documents
    assert found.messages == [] and found.exercises[0].prompt[0] == system
