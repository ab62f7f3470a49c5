"""The preprocess stage as a whole, on generated papers and on files, with a tokenizer of bytes."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

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
    monkeypatch.setattr(encode, "PAPERS_PER_PROCESS", 1)
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
    with pytest.raises(StageError, match="no tokenizer can be loaded; run the backbone stage first"):
        preprocess(config, BACKBONE)
    tokenizer.save_pretrained(folder)
    with pytest.raises(StageError, match="no chat template"):
        preprocess(config, BACKBONE)
    with pytest.raises(StageError, match="'other' is not among tiny-random"):
        preprocess(config, "other")


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
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
    assert "bad.json, line 1, column" in result.stderr
    assert "cut off" in result.stderr
    assert episodes(good, "train").num_rows == 35
