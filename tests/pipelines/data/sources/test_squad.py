"""SQuAD's schema: what is written, which questions share it, and what becomes of bad records."""

import gzip
import json

import pytest

from pipelines.config.data import SquadSource
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError
from tests.paths import DATA

TEXT = "Ada lived in Paris. She met Bo in 1843, in May. Nobody knows why."


def answer(text, start=None):
    return {"text": text, "answer_start": TEXT.find(text) if start is None else start}


def asked(question_id, *answers, **fields):
    return {"id": question_id, "question": f" {question_id}? ", "answers": list(answers), **fields}


def article(*questions, title="Ada", text=TEXT):
    return {"title": title, "paragraphs": [{"context": text, "qas": list(questions)}]}


@pytest.fixture
def load(tmp_path):
    def load(*articles, split="train", **settings):
        for name, content in (("train", articles), ("eval", [article(asked("e", answer("Paris")), title="Other")])):
            (tmp_path / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": list(content)}))
        files = {"train_files": [str(tmp_path / "train.json")], "eval_files": [str(tmp_path / "eval.json")]}
        return load_corpus(SquadSource(kind="squad", **files | settings), split, tmp_path)

    return load


def texts(corpus):
    return [(document.messages[0]["content"], [e.question_id for e in document.exercises])
            for document in corpus.documents]  # fmt: skip


QUESTIONS = (
    asked("where", answer("Paris")),
    asked("when", answer("1843"), answer("1843"), answer("in 1843, in May")),
    asked("whom", answer("Bo")),
)


def test_all_questions_about_a_passage_share_its_write(load):
    corpus = load(article(*QUESTIONS))
    assert texts(corpus) == [(TEXT, ["where", "when", "whom"])]
    (document,) = corpus.documents
    assert document.exercises[1].references == ["1843", "in 1843, in May"]
    assert document.exercises[0].prompt == [{"role": "user", "content": "where?"}]
    assert document.group == "Ada"


def test_of_sentences_those_that_hold_the_answer_are_written(load):
    across = asked("both", answer("Paris. She met Bo"))
    corpus = load(article(*QUESTIONS, across), write="sentence")
    assert texts(corpus) == [
        ("Ada lived in Paris.", ["where"]),
        ("Ada lived in Paris. She met Bo in 1843, in May.", ["both"]),
        ("She met Bo in 1843, in May.", ["when", "whom"]),
    ]
    assert len({document.document_id for document in corpus.documents}) == 3


def test_windows_are_runs_of_two_or_three_sentences_that_cover_the_passage_once(load):
    names = [f"Name{n}" for n in range(40)]
    passage = " ".join(f"Here comes {name} of number {n}." for n, name in enumerate(names))
    asked_all = [asked(name, {"text": name, "answer_start": passage.find(name)}) for name in names]
    corpus = load(article(*asked_all, text=passage), write="window")
    assert [e.question_id for d in corpus.documents for e in d.exercises] == names
    written = [d.messages[0]["content"] for d in corpus.documents]
    assert " ".join(written) == passage
    sizes = [len(d.exercises) for d in corpus.documents]
    assert set(sizes[:-1]) == {2, 3}
    assert texts(load(article(*asked_all, text=passage), write="window")) == texts(corpus)


def test_gaps_are_asked_beside_the_questions_and_alone_of_the_other_texts(load):
    corpus = load(article(*QUESTIONS), write="sentence", gaps=1)
    assert [[e.kind for e in d.exercises] for d in corpus.documents] == [
        ["extractive", "gap"], ["extractive", "extractive", "gap"]
    ]  # fmt: skip
    others = load(article(asked("where", answer("Paris"))), write="sentence", texts="others", gaps=2)
    assert {d.messages[0]["content"]: [e.kind for e in d.exercises] for d in others.documents} == {
        "She met Bo in 1843, in May.": ["gap", "gap"]  # the last sentence has no word to leave out
    }
    assert all(e.kind != "gap" for d in load(split="eval", gaps=2).documents for e in d.exercises)


@pytest.mark.parametrize(
    ("question", "lost", "reason"),
    [
        (asked("q"), "question", "it has no answers"),
        (asked("q", answer("London", 3)), "answer", "'London' isn't in the passage"),
        (asked("q", answer(" ", 3)), "answer", "answer 1 of 1: it is empty"),
        (asked("q", {"text": "Paris"}), "answer", "answer_start: Field required"),
        (asked("q", {"text": None, "answer_start": 3}), "answer", "text: Input should be a valid string"),
        (asked("q", answer("Paris"), question=" "), "question", "the question is empty"),
        (asked("q", answer("Paris"), question=float("nan")), "question", "question: Input should be a valid string"),
        (asked("q", answers="Paris"), "question", "answers: Input should be a valid list"),
    ],
)
def test_a_bad_question_is_reported_and_the_others_kept(load, question, lost, reason):
    corpus = load(article(question, asked("good", answer("Paris"))))
    assert [e.question_id for d in corpus.documents for e in d.exercises] == ["good"]
    found = corpus.bad_records[0]
    assert (found.lost, found.paper_id, found.question_id) == (lost, "Ada/0", "q") and reason in found.reason


def test_a_wrong_offset_is_put_right_where_the_answer_is_found(load):
    corpus = load(article(asked("q", answer("1843", 0))), write="sentence")
    assert texts(corpus) == [("She met Bo in 1843, in May.", ["q"])] and not corpus.bad_records


def test_a_question_without_an_answer_is_unanswerable_about_a_passage_and_lost_about_a_sentence(load):
    impossible = asked("q", is_impossible=True)
    (document,) = load(article(impossible)).documents
    assert (document.exercises[0].references, document.exercises[0].kind) == (["Unanswerable"], "unanswerable")
    corpus = load(article(impossible, asked("good", answer("Bo"))), write="sentence")
    assert [b.question_id for b in corpus.bad_records] == ["q"] and len(corpus.documents) == 1


def test_repeated_ids_and_half_characters_are_kept_and_named(load):
    text = TEXT.replace("why", "why \ud83d")
    corpus = load(article(asked("q", answer("Paris")), asked("q", answer("Bo")), text=text))
    (document,) = corpus.documents
    assert [e.question_id for e in document.exercises] == ["q", "q-2"]
    assert corpus.renamed_questions == ["q-2"]
    assert [(b.lost, b.paper_id) for b in corpus.bad_records] == [("characters", "Ada")]
    document.messages[0]["content"].encode()


def test_articles_are_held_out_whole_where_there_are_no_evaluation_files(load):
    articles = [article(asked(f"{n}", answer("Paris")), title=f"t{n}") for n in range(10)]
    found = {split: load(*articles, split=split, eval_files=[], eval_share=0.3) for split in ("train", "eval")}
    titles = {split: {d.group for d in corpus.documents} for split, corpus in found.items()}
    assert len(titles["eval"]) == 3 and len(titles["train"]) == 7 and not titles["eval"] & titles["train"]
    assert [d.group for d in load(*articles, split="eval").documents] == ["Other"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "the file holds an array; expected SQuAD's JSON"),
        ({"p": {"full_text": []}}, "an object without a list of 'data'; expected SQuAD's JSON"),
        ({"data": []}, "no usable record in it \\(it is empty\\)"),
        (
            {"data": [{"title": "t", "paragraphs": [{"context": 3, "qas": []}]}]},
            "first of 1 bad records: t/0: context",
        ),
        ({"data": [{"title": "t"}]}, "data.0: paragraphs: Field required"),
    ],
)
def test_a_file_that_is_not_squad_is_named(tmp_path, content, said):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match=f"other.json: .*{said}"):
        load_corpus(SquadSource(kind="squad", train_files=[str(path)]), "train", tmp_path)


def test_compressed_files_are_read(load, tmp_path):
    load(article(*QUESTIONS))
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "train.json").read_bytes()))
    assert texts(load(article(), train_files=[str(packed)])) == texts(load(article(*QUESTIONS)))


@pytest.mark.skipif(not (DATA / "squad").exists(), reason="SQuAD is not at hand")
@pytest.mark.parametrize(
    ("file", "questions"),
    [("squad/squad-train-44-articles.json.gz", 11877), ("squadshifts/new_wiki_v1.0.json.gz", 7938),
     ("xquad/xquad.en.json.gz", 1190)],
)  # fmt: skip
def test_the_real_files_are_read_whole(tmp_path, file, questions):
    for write in ("passage", "sentence"):
        settings = SquadSource(kind="squad", train_files=[str(DATA / file)], eval_files=[str(DATA / file)], write=write)
        corpus = load_corpus(settings, "train", tmp_path)
        assert corpus.questions == questions and not corpus.bad_records
    assert all(
        e.references[0] in d.messages[0]["content"] for d in corpus.documents for e in d.exercises
    )  # the sentence holds the answer
