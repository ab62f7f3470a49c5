"""Reading QASPER: every answer type, bad records one by one, and files that aren't QASPER."""

import json
import re

import datasets
import pytest
from pydantic import TypeAdapter

from pipelines.config import Data
from pipelines.config.data import DataSource
from pipelines.data.papers import Answer, Section, paper_document, read_papers
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError


def answer(**fields):
    empty = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
    return {"answer": {**empty, "evidence": [], "highlighted_evidence": [], **fields}, "worker_id": "w"}


def question(*answers, question_id="q", text="What?", **fields):
    return {"question": text, "question_id": question_id, "answers": list(answers), **fields}


def paper(*questions, **fields):
    sections = [{"section_name": "Data", "paragraphs": ["We used data."]}]
    return {"title": "T", "abstract": "A", "full_text": sections, "qas": list(questions), **fields}


RED = answer(extractive_spans=["red"])


def read(path):
    bad = []
    return list(read_papers(path, bad)), bad


@pytest.fixture
def write(tmp_path):
    def write(content, name="papers.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"extractive_spans": [" red", "dark blue ", ""]}, Answer("red, dark blue", "extractive")),
        ({"free_form_answer": " In 2019 "}, Answer("In 2019", "free_form")),
        ({"yes_no": True}, Answer("Yes", "yes_no")),
        ({"yes_no": False}, Answer("No", "yes_no")),
        ({"unanswerable": True}, Answer("Unanswerable", "unanswerable")),
        ({"unanswerable": True, "free_form_answer": "x"}, Answer("Unanswerable", "unanswerable")),
        ({"extractive_spans": ["red"], "free_form_answer": "x"}, Answer("red", "extractive")),
    ],
)
def test_answer_types(write, fields, expected):
    papers, bad = read(write({"p": paper(question(answer(**fields)))}))
    assert papers[0].questions[0].answers == (expected,)
    assert not bad


def test_annotators_keep_file_order(write):
    papers, _ = read(write({"p": paper(question(answer(yes_no=False), RED, answer(yes_no=True)))}))
    assert [a.text for a in papers[0].questions[0].answers] == ["No", "red", "Yes"]


def test_papers_keep_file_order_and_unnamed_sections(write):
    unnamed = [{"section_name": None, "paragraphs": ["Text."]}]
    papers, bad = read(write({"b": paper(full_text=unnamed), "a": paper(title=None, abstract=None)}))
    assert [p.paper_id for p in papers] == ["b", "a"]
    assert papers[0].sections == (Section("", ("Text.",)),)
    assert (papers[1].title, papers[1].abstract, bad) == ("", "", [])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (question(), "no answers"),
        (question(answer()), "none of its answers is usable"),
        (question(answer(extractive_spans=["", " "])), "none of its answers is usable"),
        (question(RED, text="  "), "question is empty"),
        (question(RED, question=None), "question: Input should be a valid string"),
        ({"question_id": "q", "question": "What?"}, "answers: Field required"),
        (question(RED, answers="red"), "answers: Input should be a valid list"),
    ],
)
def test_bad_question_is_reported_and_the_others_kept(write, record, reason):
    papers, bad = read(write({"p": paper(record, question(RED, question_id="good"))}))
    assert [q.question_id for q in papers[0].questions] == ["good"]
    lost = [b for b in bad if b.lost == "question"]
    assert [(b.paper_id, b.question_id) for b in lost] == [("p", "q")]
    assert reason in lost[0].reason


@pytest.mark.parametrize(
    ("bad_answer", "reason"),
    [
        (answer(), "answer 1 of 2: all of its fields are empty"),
        (
            answer(extractive_spans="red"),
            "answer 1 of 2: answer.extractive_spans: Input should be a valid list",
        ),
        (answer(yes_no="maybe"), "answer 1 of 2: answer.yes_no: Input should be a valid boolean"),
        ({"worker_id": "w"}, "answer 1 of 2: answer: Field required"),
    ],
)
def test_bad_annotation_is_reported_and_the_question_kept(write, bad_answer, reason):
    papers, bad = read(write({"p": paper(question(bad_answer, RED))}))
    assert papers[0].questions[0].answers == (Answer("red", "extractive"),)
    assert [(b.lost, b.paper_id, b.question_id, b.reason) for b in bad] == [("answer", "p", "q", reason)]


def test_question_without_id_is_reported_by_its_place(write):
    _, bad = read(write({"p": paper(question(RED), {"question": "What?", "answers": [RED]})}))
    assert (bad[0].question_id, bad[0].reason) == ("qas.1", "question_id: Field required")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"title": "T", "qas": [question(RED)]}, "full_text: Field required; its 1 questions are lost"),
        (paper(full_text=[{"paragraphs": [3]}]), "full_text.0.paragraphs.0: Input should be a valid string"),
        ({"title": "T", "full_text": []}, "qas: Field required"),
        ([], "valid dictionary"),
    ],
)
def test_bad_paper_is_reported_and_the_others_kept(write, record, reason):
    papers, bad = read(write({"bad": record, "good": paper(question(RED))}))
    assert [p.paper_id for p in papers] == ["good"]
    assert (bad[0].lost, bad[0].paper_id) == ("paper", "bad")
    assert reason in bad[0].reason


@pytest.mark.parametrize(
    ("content", "position", "told"),
    [
        ("# Notes\nno JSON", "line 1, column 1", "not JSON"),
        ("", "line 1, column 1", "cut off"),
        ("[1, 2]", "line 1", "holds an array at its top"),
        ("{}", "line 1", "the object is empty"),
        ('{"version": "2", "data": []}', '["version"]', "full_text"),
        ('{"p": {"context": "x", "questions": []}}', '["p"]', "full_text"),
        ('{"p": {"a": 1, "a": 2}}', "'a'", "appears twice"),
    ],
)
def test_file_that_is_not_qasper(write, content, position, told):
    path = write(content)
    with pytest.raises(StageError) as error:
        read(path)
    assert str(path) in str(error.value)
    assert position in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.999])
def test_truncated_file(write, share):
    whole = json.dumps({"p": paper(question(RED)), "q": paper(question(RED))}, indent=1)
    with pytest.raises(StageError, match=r"papers.json, line \d+, column \d+: not JSON"):
        read(write(whole[: int(len(whole) * share)]))


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(StageError, match="can't be read"):
        read(tmp_path / "none.json")
    (tmp_path / "image.json").write_bytes(b"{\x89PNG\xff")
    with pytest.raises(StageError, match="byte 1: not UTF-8"):
        read(tmp_path / "image.json")


def test_repeated_papers_and_question_ids_over_files(write, tmp_path):
    first = write({"p": paper(question(RED), question(RED))}, "first.json")
    second = write({"p": paper(question(RED)), "other": paper(question(RED))}, "second.json")
    data = Data(source="files", train_files=[str(first), str(second)], eval_files=[str(first)])
    corpus = load_corpus(data.named_sources["qasper"], "train", tmp_path)
    assert [e.question_id for d in corpus.documents for e in d.exercises] == ["q", "q-2", "q-3"]
    assert corpus.renamed_questions == ["q-2", "q-3"]
    assert [(b.lost, b.paper_id) for b in corpus.bad_records] == [("paper", "p")]
    assert "its 1 questions are lost" in corpus.bad_records[0].reason


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def on_hub(folder):
    return Data(source="hub", hub_id=str(folder)).named_sources["qasper"]


def columns(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def test_hub_form_gives_the_same_papers(write, tmp_path, own_cache):
    records = {
        "p": paper(question(answer(yes_no=True), RED), question(answer(unanswerable=True), question_id="r")),
        "s": paper(question(answer(free_form_answer="In 2019"), question_id="s")),
    }
    rows = [
        record
        | {"id": paper_id, "full_text": columns(record["full_text"])}
        | {"qas": columns([q | {"answers": columns(q["answers"])} for q in record["qas"]])}
        for paper_id, record in records.items()
    ]
    for split in ("train", "validation"):
        (tmp_path / "hub" / split).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / split / "0000.parquet")
    corpus = load_corpus(on_hub(tmp_path / "hub"), "eval", tmp_path)
    assert [*corpus.documents] == [paper_document(paper) for paper in read(write(records))[0]]
    assert not corpus.bad_records


def test_hub_data_set_that_is_not_qasper(tmp_path, own_cache):
    (tmp_path / "hub" / "train").mkdir(parents=True)
    datasets.Dataset.from_list([{"text": "x"}]).to_parquet(tmp_path / "hub" / "train" / "0.parquet")
    with pytest.raises(StageError, match="columns full_text, id, qas are missing"):
        load_corpus(on_hub(tmp_path / "hub"), "train", tmp_path)


def test_hub_that_is_not_there(tmp_path, own_cache):
    with pytest.raises(StageError, match="can't be loaded.*'generated'"):
        load_corpus(on_hub(tmp_path / "nothing"), "train", tmp_path)


def test_in_the_releases_form_a_paper_is_one_message_of_numbered_turns(write):
    sections = [{"section_name": f"S{n}", "paragraphs": ["Words. " * 100, "More. " * 100]} for n in range(20)]
    asked = [question(RED), question(answer(unanswerable=True), RED, question_id="r")]
    path = write({"p": paper(*asked, full_text=sections)})
    split = {"train_files": [str(path)], "eval_files": [str(path)]}
    source = TypeAdapter(DataSource).validate_python({"kind": "qasper", **split, "form": "release"})
    (document,) = load_corpus(source, "train", path.parent).documents
    system, written = document.messages
    turns = re.split(r"(?:^|\n\n)Turn (\d+):\n", written["content"])[1:]
    assert (system["role"], written["role"]) == ("system", "user")
    # title and abstract, and of every section two paragraphs, which are too long for one turn
    assert list(map(int, turns[::2])) == list(range(1, 42))
    assert max(map(len, turns[1::2])) <= 1000
    first, second = document.exercises
    assert [m["role"] for m in first.prompt] == ["system", "user"] and first.prompt[0] == system
    assert (first.references, second.references) == (["red"], ["No information available.", "red"])
    assert second.references[0] in system["content"]
    plain = TypeAdapter(DataSource).validate_python({"kind": "qasper", **split})
    sections = [m["content"] for m in next(iter(load_corpus(plain, "train", path.parent).documents)).messages]
    assert " ".join(turns[1::2]).split() == " ".join(sections).split()  # not a word is lost
