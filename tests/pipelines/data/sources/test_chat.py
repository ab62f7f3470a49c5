"""Chats: what of them is written, visible and learnt, in which forms they come, and what becomes of bad ones."""

import gzip
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from pipelines.config.data import ChatSource
from pipelines.data.sources import load_corpus
from pipelines.errors import StageError


def chat(*texts, **fields):
    """Turns of user and assistant, after a system message if the first text begins with "!"."""
    messages = [{"role": "system", "content": texts[0][1:]}] if texts[0].startswith("!") else []
    roles = ("user", "assistant") * len(texts)
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts[len(messages) :], strict=False)]
    return {"messages": messages, **fields}


TWO_TURNS = chat("I'm Ada.", "Hello Ada.", "Who am I?", "You are Ada.")
OTHER = chat("a", "b", "c", "d")


@pytest.fixture
def load(tmp_path):
    def load(*records, split="train", name="chats.jsonl", **settings):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
        files = {"train_files": [str(path)], "eval_files": [str(path)]} | settings
        return load_corpus(ChatSource(kind="chat", **files), split, tmp_path)

    return load


def parts(document):
    """What is written, what is visible and what is learnt, as texts."""
    (exercise,) = document.exercises
    prompt = [message["content"] for message in exercise.prompt]
    return [message["content"] for message in document.messages], prompt, exercise.references


def test_what_came_before_the_last_message_is_written_and_the_last_reply_learnt(load):
    (document,) = load(TWO_TURNS).documents
    assert parts(document) == (["I'm Ada.", "Hello Ada."], ["Who am I?"], ["You are Ada."])
    assert (document.noun, document.drop_first) == ("chat", "oldest")


def test_more_messages_can_stay_visible_and_the_visible_be_written_too(load):
    (document,) = load(TWO_TURNS, visible=2).documents
    assert parts(document) == (["I'm Ada."], ["Hello Ada.", "Who am I?"], ["You are Ada."])
    (document,) = load(TWO_TURNS, visible=2, write="all").documents
    assert parts(document)[0] == ["I'm Ada.", "Hello Ada.", "Who am I?"]


def test_every_reply_is_learnt_from_a_write_of_its_own(load):
    documents = load(chat("1", "2", "3", "4", "5", "6"), supervise="every").documents
    assert [parts(document) for document in documents] == [
        (["1", "2"], ["3"], ["4"]),
        (["1", "2", "3", "4"], ["5"], ["6"]),
    ]
    assert len({document.document_id for document in documents}) == 2
    assert len({document.group for document in documents}) == 1
    first, *_ = load(chat("1", "2", "3", "4"), supervise="every", write="all").documents
    assert parts(first) == (["1"], ["1"], ["2"])


def test_a_first_reply_is_learnt_from_an_empty_memory_where_that_is_wanted(load):
    chats = chat("1", "2", "3", "4"), chat("!Own.", "5", "6")
    found = list(load(*chats, supervise="every", first_replies=True, system_prompt="Be brief.").documents)
    assert [parts(document) for document in found] == [
        ([], ["Be brief.", "1"], ["2"]),
        (["Be brief.", "1", "2"], ["Be brief.", "3"], ["4"]),
        ([], ["Own.", "5"], ["6"]),
    ]
    assert [document.empty_memory for document in found] == [True, False, True]
    assert [document.exercises[0].kind for document in found] == ["first_reply", "reply", "first_reply"]
    corpus = load(*chats, supervise="every")
    assert [parts(document) for document in corpus.documents] == [(["1", "2"], ["3"], ["4"])]
    assert [(bad.lost, bad.question_id) for bad in corpus.bad_records] == [
        ("reply", "chats.jsonl:1/1"),
        ("reply", "chats.jsonl:2/2"),
    ]
    assert all("there is nothing to write" in bad.reason for bad in corpus.bad_records)


def test_the_system_message_stands_in_what_is_written_and_what_is_read(load):
    with_own = chat("!Own.", "1", "2", "3", "4")
    own, given = load(with_own, OTHER, system_prompt="Be brief.").documents
    assert parts(own) == (["Own.", "1", "2"], ["Own.", "3"], ["4"])
    assert parts(given) == (["Be brief.", "a", "b"], ["Be brief.", "c"], ["d"])


def test_prompt_and_response_are_a_chat_of_two_messages(load):
    (document,) = load({"prompt": "Say A.", "response": "A"}, write="all").documents
    assert parts(document) == (["Say A."], ["Say A."], ["A"])


def test_contents_may_be_text_parts_and_what_follows_the_last_reply_is_left_out(load):
    record = json.loads(json.dumps(TWO_TURNS))
    record["messages"][0]["content"] = [{"type": "text", "text": "I'm"}, {"type": "text", "text": "Ada."}]
    record["messages"].append({"role": "user", "content": "Thanks."})
    (document,) = load(record).documents
    assert parts(document) == (["I'm\nAda.", "Hello Ada."], ["Who am I?"], ["You are Ada."])


def test_every_format_gives_the_same_documents(load, tmp_path):
    records = [TWO_TURNS | {"id": "x"}, OTHER | {"id": 7}]
    lines = load(*records)
    assert [document.document_id for document in lines.documents] == ["x/3", "7/3"]
    (tmp_path / "chats.json").write_text(json.dumps(records))
    (tmp_path / "chats.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    typed = [record | {"id": str(record["id"])} for record in records]
    parquet.write_table(pa.Table.from_pylist(typed), tmp_path / "chats.parquet")
    for name in ("chats.json", "chats.json.gz", "chats.parquet"):
        settings = ChatSource(kind="chat", train_files=[str(tmp_path / name)], eval_files=["unused"])
        assert list(load_corpus(settings, "train", tmp_path).documents) == list(lines.documents)


def test_a_hub_data_set_gives_the_same_documents(load, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "train").mkdir(parents=True)
    records = [chat(f"{n}", "b", "c", "d", id=f"c{n}") for n in range(10)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "hub" / "train" / "0.parquet")
    settings = ChatSource(kind="chat", hub_id=str(tmp_path / "hub"), eval_share=0.2)
    found = {split: list(load_corpus(settings, split, tmp_path).documents) for split in ("train", "eval")}
    assert len(found["eval"]) == 2
    everything = sorted(found["train"] + found["eval"], key=lambda document: document.document_id)
    assert everything == list(load(*records).documents)
    with pytest.raises(StageError, match="can't be loaded from the Hub.*give the files .* as 'train_files'"):
        load_corpus(ChatSource(kind="chat", hub_id=str(tmp_path / "nothing")), "train", tmp_path)


@pytest.mark.parametrize(
    ("record", "lost", "reason"),
    [
        ('{"messages": [', "chat", "not JSON"),
        ("[1]", "chat", "it is an array; expected records with 'messages'"),
        ({"text": "x"}, "chat", "it has no list of messages (text)"),
        ({"messages": []}, "chat", "it has no list of messages"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "chat",
            "message 1: its role is 'bot'; expected one of",
        ),
        ({"messages": ["x"]}, "chat", "message 1: its role is None"),
        ({"messages": [{"role": "user", "content": None}]}, "chat", "message 1: its content is null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "chat", "its content is an array"),
        ({"messages": [{"role": "user", "content": "x"}]}, "chat", "no reply of the assistant's"),
        ({"prompt": "x", "response": 3}, "chat", "assistant: its content is a number, not text"),
        (chat("a", "b", "c", "d", finished="no"), "chat", "finished is a string; expected true, or false"),
        (chat("a", "b", "c", " "), "reply", "the reply is empty"),
        (chat("a", "b"), "reply", "there is nothing to write: no text comes before what is visible (visible: 1; with"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "reply", "no message comes before the reply"),
    ],
)
def test_a_bad_chat_is_reported_by_its_line_and_the_others_kept(load, record, lost, reason):
    corpus = load(TWO_TURNS, record)
    assert len(corpus.documents) == 1
    (found,) = corpus.bad_records
    assert (found.lost, found.paper_id) == (lost, "chats.jsonl:2") and reason in found.reason


def test_only_the_last_reply_of_a_chat_that_was_cut_off_has_no_end(load):
    said = ("a", "b", "c", "d", "e", "f")
    corpus = load(
        chat(*said, finished=False), chat(*said, finished=True), chat(*said, finished=None), supervise="every"
    )
    finished = [exercise.finished for document in corpus.documents for exercise in document.exercises]
    assert finished == [True, False, True, True, True, True]


def test_repeated_ids_and_half_characters_are_kept_and_named(load):
    corpus = load(TWO_TURNS | {"id": "x"}, chat("\ud83d", "b", "c", "d", id="x"))
    assert [document.document_id for document in corpus.documents] == ["x/3", "x/3-2"]
    assert corpus.renamed_documents == ["x/3-2"]
    assert [(b.lost, b.paper_id) for b in corpus.bad_records] == [("characters", "x")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chats.txt", "x", "the name must end with .json, .jsonl"),
        ("chats.json", json.dumps(TWO_TURNS), "holds an object; expected an array of records"),
        ("chats.json", f"{json.dumps(TWO_TURNS)}\n{json.dumps(OTHER)}", "a file with a record a line is named .jsonl"),
        ("chats.parquet", "x", "can't be read as Parquet"),
        ("chats.jsonl", "", "no usable record in it .it is empty."),
        ("chats.jsonl", "{}\n{}", "the first of 2 bad records: chats.jsonl:1: it has no list of messages"),
    ],
)
def test_a_file_without_chats_is_named(load, name, text, said):
    with pytest.raises(StageError, match=f"{name}.*{said}"):
        load(text, name=name)


def test_a_source_without_data_is_refused():
    with pytest.raises(ValidationError, match="give train_files, or the hub_id"):
        ChatSource(kind="chat")
