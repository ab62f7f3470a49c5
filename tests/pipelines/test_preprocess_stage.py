"""The preprocess stage as a whole, on generated papers and on files, with a tokenizer of bytes."""

import json
import shutil
import subprocess
import sys
from collections import Counter, namedtuple

import pytest

from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.config import Generated, resolve_config
from pipelines.data import encode
from pipelines.data.generate import generate_papers
from pipelines.errors import StageError
from pipelines.preprocess import open_episodes, preprocess
from pipelines.run.layout import Layout

BACKBONE = "tiny-random"


@pytest.fixture
def configure(tmp_path):
    """A configuration with the given data section whose backbone is there, as far as this stage needs it."""

    def configure(**data):
        settings = {"name": "run", "results_dir": str(tmp_path / "results"), "data": data}
        names = {"backbones": [BACKBONE], "strategies": ["tsw"], "benchmarks": ["qasper"]}
        config = resolve_config(settings | names, "test")
        byte_tokenizer().save_pretrained(Layout(config).backbone(BACKBONE))
        return config

    return configure


def episodes(config, split):
    return open_episodes(Layout(config).data(BACKBONE, split))


def manifest(config, split):
    return json.loads(Layout(config).data_manifest(BACKBONE, split).read_text())


def small(**changes):
    return {"source": "generated", "generated": {"train_papers": 5, "eval_papers": 3}} | changes


def test_generated(configure):
    config = configure(**small())
    preprocess(config, BACKBONE)
    assert episodes(config, "train").num_rows == 35
    assert len(set(episodes(config, "eval")["paper_id"].to_pylist())) == 3
    record = manifest(config, "train")
    row = episodes(config, "train").slice(0, 1).to_pylist()[0]
    assert byte_tokenizer().decode(row["answer_ids"]) == row["answer"] + "<|im_end|>"
    assert record["episodes"] == record["usable_questions"] == 35
    assert record["dropped"] == {}
    assert record["answer_types"] == {"extractive": 30, "unanswerable": 3, "yes_no": 2}
    assert record["tokens"]["written"]["max"] == max(map(len, episodes(config, "train")["context_ids"].to_pylist()))
    assert record["provenance"]["config_hash"]
    assert manifest(config, "eval")["papers_also_in_train"] == []


def test_generated_papers_pass_as_official_file(configure, tmp_path):
    config = configure(**small())
    preprocess(config, BACKBONE)
    written = Layout(config).data(BACKBONE, "eval") / "papers.json"
    assert json.loads(written.read_text()) == generate_papers("eval", Generated(train_papers=5, eval_papers=3))
    shutil.copy(written, tmp_path / "copy.json")
    before = episodes(config, "eval").to_pylist()
    path = str(tmp_path / "copy.json")
    from_file = configure(source="files", train_files=[path], eval_files=[path])
    preprocess(from_file, BACKBONE)
    assert episodes(from_file, "eval").to_pylist() == before
    assert len(manifest(from_file, "eval")["papers_also_in_train"]) == 3


def test_same_bytes_with_one_and_two_processes(configure, monkeypatch):
    monkeypatch.setattr(encode, "DOCUMENTS_PER_PROCESS", 1)
    folders = []
    for processes in (1, 2):
        config = configure(**small(processes=processes, shard_megabytes=1, max_train_questions=20))
        preprocess(config, BACKBONE)
        folder = Layout(config).data(BACKBONE, "train")
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1]
    assert {"shard-00000.arrow", "manifest.json", "papers.json"} == set(folders[0])


def test_limits_take_the_first_questions(configure):
    config = configure(**small(max_train_questions=10, max_eval_questions=100))
    preprocess(config, BACKBONE)
    ids = episodes(config, "train")["question_id"].to_pylist()
    assert ids == [f"generated-0-train-{n // 7:05d}-q{n % 7}" for n in range(10)]
    assert manifest(config, "train")["beyond_limit"] == 25
    assert (episodes(config, "eval").num_rows, manifest(config, "eval")["beyond_limit"]) == (21, 0)


def test_a_values_weight_is_of_training_alone_and_changes_nothing_else(configure):
    def made(split, **settings):
        told = {"kind": "conversations", "train_conversations": 6, "eval_conversations": 4, **settings}
        config = configure(sources={"told": told, "made": {"kind": "generated", "train_papers": 2, "eval_papers": 1}})
        preprocess(config, BACKBONE)
        return episodes(config, split).to_pylist(), manifest(config, split)["shards"]

    for split in ("train", "eval"):
        (plain, before), (weighed, after) = made(split), made(split, value_weight=3.0)
        given = [(row, row.pop("answer_weights")) for row in weighed]
        assert weighed == [{key: row[key] for key in row if key != "answer_weights"} for row in plain]
        assert all(row["answer_weights"] is None for row in plain)
        known = [(row, weights) for row, weights in given if weights]
        assert [row["answer_type"] for row, _ in known] == ["told"] * len(known)
        if split == "eval":
            assert not known and before == after
            continue
        assert len(known) == sum(row["answer_type"] == "told" for row in plain) > 6 and before != after
        for row, weights in known:
            value = [token for token, weight in zip(row["answer_ids"], weights, strict=True) if weight == 3.0]
            assert byte_tokenizer().decode(value).lower() == row["references"][1].lower() and set(weights) == {1, 3}


def official_file(folder, name="papers.json"):
    """Three papers: a usable one with bad records, one that is too long, one without text."""
    red = {"answer": {"extractive_spans": ["red"]}}
    empty = {"answer": {"extractive_spans": [], "free_form_answer": ""}}

    def paper(text, *answers):
        qas = [{"question": "What?", "question_id": f"{text[:5]}-{n}", "answers": a} for n, a in enumerate(answers)]
        return {"title": "", "full_text": [{"section_name": "S", "paragraphs": [text]}], "qas": qas}

    papers = {
        "good": paper("short text", [red], [empty], []),
        "long": paper("long text " * 100, [red], [red]),
        "void": paper("", [red]),
    }
    path = folder / name
    path.write_text(json.dumps(papers))
    return str(path)


def test_every_question_is_accounted_for(configure, tmp_path):
    path = official_file(tmp_path)
    config = configure(source="files", train_files=[path], eval_files=[path], max_written_tokens=500)
    preprocess(config, BACKBONE)
    record = manifest(config, "train")
    assert record["episodes"] == 1
    assert record["dropped"] == {
        "the paper has no text": {"count": 1, "question_ids": ["-0"]},
        "the paper is longer than max_written_tokens": {"count": 2, "question_ids": ["long -0", "long -1"]},
    }
    assert record["bad_records"]["lost"] == {"answer": 1, "question": 2}
    lost = [r for r in record["bad_records"]["records"] if r["lost"] == "question"]
    assert [(r["paper_id"], r["question_id"]) for r in lost] == [("good", "short-1"), ("good", "short-2")]
    assert record["source"]["files"][0]["path"] == path


def test_overlong_papers_can_be_truncated(configure, tmp_path):
    path = official_file(tmp_path)
    data = {"source": "files", "train_files": [path], "eval_files": [path]}
    config = configure(**data, max_written_tokens=500, overlong="truncate")
    preprocess(config, BACKBONE)
    assert manifest(config, "train")["truncated_papers"] == ["long"]
    assert manifest(config, "train")["tokens"]["written"]["max"] in range(490, 501)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_written_tokens": 10}, "train: none of 35 questions gives an episode .*max_written_tokens: 35"),
        ({"max_read_tokens": 10}, "train: none of 35 questions gives an episode .*max_read_tokens: 35"),
    ],
)
def test_nothing_left(configure, changes, told):
    config = configure(**small(**changes))
    with pytest.raises(StageError, match=told):
        preprocess(config, BACKBONE)
    assert not Layout(config).data(BACKBONE, "train").exists()


def test_backbone_that_is_not_prepared_or_cannot_chat(configure):
    config = configure(**small())
    folder = Layout(config).backbone(BACKBONE)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(folder)
    with pytest.raises(StageError, match="there is no such folder; run the backbone stage first"):
        preprocess(config, BACKBONE)
    folder.mkdir()
    with pytest.raises(StageError, match="no tokenizer can be loaded"):
        preprocess(config, BACKBONE)
    tokenizer.save_pretrained(folder)
    with pytest.raises(StageError, match="no chat template"):
        preprocess(config, BACKBONE)
    with pytest.raises(StageError, match="'other' is not among tiny-random"):
        preprocess(config, "other")


@pytest.fixture
def three_sources(tmp_path):
    """Entries of three kinds of source, each with a bad record where its files can have one."""
    told = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in
            (("user", "I like"), ("assistant", "Good."), ("user", "What do I like?"), ("assistant", "You like"))]}
            for n in range(6)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(["oops", *map(json.dumps, told)]))
    passages = [{"title": f"t{n}", "paragraphs": [{"context": f"Ada had {n} cats.", "qas": [
        {"id": "q", "question": "How many?", "answers": [{"text": str(n), "answer_start": 8}]}]}]}
        for n in range(4)]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": passages}))
    return {
        "chats": {"kind": "chat", "train_files": [str(tmp_path / "chats.jsonl")], "eval_share": 0.2,
                  "system_prompt": "Be brief."},
        "squad": {"kind": "squad", "train_files": [str(tmp_path / "squad.json")], "eval_share": 0.2, "weight": 2},
        "facts": {"kind": "generated", "told": "conversation", "train_papers": 3, "eval_papers": 2,
                  "facts_per_paper": 2},
    }  # fmt: skip


def test_a_mixture_has_every_source_in_both_splits(configure, three_sources):
    config = configure(sources=three_sources)
    preprocess(config, BACKBONE)
    counts = {split: Counter(episodes(config, split)["source"].to_pylist()) for split in ("train", "eval")}
    assert counts == {"train": {"chats": 5, "squad": 3, "facts": 9}, "eval": {"chats": 1, "squad": 1, "facts": 6}}
    rows = episodes(config, "train").to_pylist()
    assert len({row["question_id"] for row in rows}) == 17, "ids of one source differ from another's"
    assert all(row["paper_id"].startswith(f"{row['source']}/") for row in rows)
    tokenizer, chat = byte_tokenizer(), rows[0]
    assert tokenizer.decode(chat["question_ids"]) == tokenizer.apply_chat_template(
        chat["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant"]
    assert [message["role"] for message in chat["prompt"]] == ["system", "user"]
    record = manifest(config, "train")
    assert (record["episodes"], record["papers"]) == (17, 5 + 3 + 3)
    assert record["sources"]["chats"]["bad_records"]["lost"] == {"chat": 1}
    assert record["sources"]["squad"]["renamed_questions"] == ["q-2", "q-3"]
    assert record["sources"]["squad"]["source"]["held_out"] == 0.2
    assert manifest(config, "eval")["papers_also_in_train"] == []


def test_limits_hold_for_each_source_of_a_mixture(configure, three_sources):
    config = configure(sources=three_sources, max_train_questions=4, max_eval_questions=1)
    preprocess(config, BACKBONE)
    assert Counter(episodes(config, "train")["source"].to_pylist()) == {"chats": 4, "squad": 3, "facts": 4}
    assert manifest(config, "train")["sources"]["facts"]["beyond_limit"] == 5


def test_a_source_that_gives_nothing_is_named(configure, three_sources, tmp_path):
    config = configure(sources=three_sources, max_written_tokens=45)
    with pytest.raises(
        StageError, match="train: data.sources.chats: none of 5 .*the chat is longer than max_written.*: 5"
    ):
        preprocess(config, BACKBONE)
    (tmp_path / "squad.json").write_text("[]")
    with pytest.raises(StageError, match="data.sources.squad: .*squad.json: the file holds an array; expected SQuAD"):
        preprocess(configure(sources=three_sources), BACKBONE)


def test_a_long_chat_loses_its_oldest_messages_and_keeps_its_system_message(configure, tmp_path):
    texts = [f"{number} " + "long text " * 10 for number in range(8)]
    roles = ("user", "assistant") * 4
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps({"messages": messages})] * 2))
    source = {"kind": "chat", "train_files": [str(path)], "eval_share": 0.5}
    config = configure(sources={"chats": source}, max_written_tokens=500, overlong="truncate")
    preprocess(config, BACKBONE)
    written = episodes(config, "train")["messages"].to_pylist()[0]
    assert written[0] == messages[0] and 1 < len(written) < 7
    assert written[1:] == [{"role": m["role"], "content": m["content"]} for m in messages[1:7]][-len(written[1:]) :]
    assert manifest(config, "train")["sources"]["chats"]["truncated_papers"]


def test_half_a_character_in_a_paper_is_replaced_and_named(configure, tmp_path):
    path = official_file(tmp_path)
    text = (tmp_path / "papers.json").read_text().replace("short text", "short text \\ud83d")
    (tmp_path / "papers.json").write_text(text)
    config = configure(source="files", train_files=[path], eval_files=[path], max_written_tokens=500)
    preprocess(config, BACKBONE)
    assert "short text \ufffd" in episodes(config, "train")["messages"].to_pylist()[0][0]["content"]
    damaged = [r for r in manifest(config, "train")["bad_records"]["records"] if r["lost"] == "characters"]
    assert [(r["paper_id"], r["reason"]) for r in damaged] == [("good", "1 lone surrogates, replaced by U+FFFD")]


def test_no_disk_space(configure, monkeypatch):
    config = configure(**small())
    preprocess(config, BACKBONE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 2000))
    with pytest.raises(StageError, match=r"not enough disk space .* MB are needed and 0\.0 MB are free"):
        preprocess(config, BACKBONE)
    assert episodes(config, "train").num_rows == 35


def test_command_line(configure, tmp_path):
    path = tmp_path / "config.json"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(generate_papers("eval", Generated()))[:1000])
    good = configure(**small())
    truncated = configure(source="files", train_files=[str(bad)], eval_files=[str(bad)])
    for config, code in ((good, 0), (truncated, 1)):
        path.write_text(config.to_json())
        command = [
            sys.executable,
            "-m",
            "pipelines.preprocess",
            "--config",
            str(path),
            "--backbone",
            BACKBONE,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
    assert "bad.json, line 1, column" in result.stderr
    assert "cut off" in result.stderr
    assert episodes(good, "train").num_rows == 35
