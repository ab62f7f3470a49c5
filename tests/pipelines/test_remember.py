"""The recipe for a memory of real text, a few steps of it, on small files in the originals' forms."""

import csv
import json

import pytest
import torch

from deltamem.adapters.files import load_adapter
from pipelines.config import resolve_config
from pipelines.config.files import PROJECT_ROOT, read_layers
from pipelines.data.shards import open_episodes
from pipelines.preprocess import preprocess
from pipelines.run.files import write_record
from pipelines.run.layout import Layout
from pipelines.strategies.kinds import recipe_of
from pipelines.train import train_cell

CONFIGS = PROJECT_ROOT / "configs"


SMALL = ["remember.yaml", "overrides/remember_cpu.yaml"]


@pytest.fixture
def prepare(tmp_path, tiny_backbone):
    """Configurations of this project with files of their own; their episodes are made."""

    def prepare(names, squad, **settings):
        _write_files(tmp_path)
        files = {kind: {"train_files": [str(tmp_path / f"{kind}.json")], "eval_files": []} for kind in FILES}
        sources = {name: files["squad"] for name in squad} | {"tweets": files["tweets"]}
        settings = {"results_dir": str(tmp_path / "results"), "backbones": ["tiny-random"], **settings}
        settings["data"] = {"sources": sources | settings.pop("sources", {}), **settings.pop("data", {})}
        above = tmp_path / "above.json"
        above.write_text(json.dumps(settings))
        config = resolve_config(read_layers([*(CONFIGS / name for name in names), above], {}), "remember")
        place = Layout(config).backbone("tiny-random")
        place.parent.mkdir(parents=True)
        place.symlink_to(tiny_backbone)
        for source in config.data.replies:
            _write_replies(Layout(config), source)
        preprocess(config, "tiny-random")
        return config

    return prepare


FILES = ("squad", "tweets")


def _write_replies(layout, source):
    """What the stage leaves (``test_replies_stage.py``) of a backbone that comes to an end, as random weights don't."""
    turns = ("user", "I live in Oslo."), ("assistant", "Noted."), ("user", "Which day is it?"), ("assistant", "I see.")
    messages = [{"role": role, "content": text} for role, text in turns]
    chats = [json.dumps({"messages": some}) + "\n" for some in (messages, messages[2:])]
    write_record(layout.replies_record("tiny-random", source), {})
    for split in ("train", "eval"):
        (layout.replies("tiny-random", source) / f"{split}.jsonl").write_text("".join(chats))


def _write_files(folder):
    names = ["Ada", "Bo", "Cy", "Dot", "Ede", "Flo", "Gus", "Hal"]
    articles = []
    for n, name in enumerate(names, start=10):
        answer = {"text": str(n), "answer_start": len(f"{name} had ")}
        asked = {"id": f"q{n}", "question": "How many cats?", "answers": [answer]}
        text = f"{name} had {n} cats. They were old. Nobody else lived there in 18{n}."
        articles.append({"title": name, "paragraphs": [{"context": text, "qas": [asked]}]})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    tweets = [{"Tweet": f"{name} is in town on day {n}!", "Question": "Which day?", "Answer": [str(n)], "qid": name}
              for n, name in enumerate(names, start=20)]  # fmt: skip
    (folder / "tweets.json").write_text(json.dumps(tweets))


@pytest.fixture
def config(prepare):
    """configs/remember.yaml with configs/overrides/remember_cpu.yaml."""
    return prepare(SMALL, ("sentences", "other_sentences", "windows", "paragraphs"))


def test_every_source_gives_what_it_is_for(config):
    episodes = open_episodes(Layout(config).data("tiny-random", "train"))
    rows = episodes.select(["source", "answer_type", "messages"]).to_pylist()
    written = {row["source"]: row["messages"][-1]["content"] for row in rows}
    assert written["sentences"].count(".") == 1 and written["paragraphs"].count(".") == 3
    assert written["facts"].startswith("The ") and "18" in written["other_sentences"]
    kinds = {name: {row["answer_type"] for row in rows if row["source"] == name} for name in written}
    assert kinds["other_sentences"] == {"gap"} and kinds["paragraphs"] == kinds["windows"] == {"extractive"}
    assert "gap" in kinds["sentences"] and "gap" in kinds["tweets"]


def test_paragraphs_come_from_the_middle_on_and_what_is_retained_is_told_from_nothing(config):
    recipe = recipe_of(config, config.cell("tiny-random", "remember", 42))
    assert {name for name, span in config.data.spans.items() if span[0]} == {"windows", "paragraphs"}
    schedule = recipe.schedule(recipe.episodes()[0], 2)
    besides = [micro.beside for step in range(4) for micro in schedule.micro_batches(step, 0)]
    assert [beside.contrast > 0 for beside in besides] == [True, True, False, False]
    retain = recipe_of(config, config.cell("tiny-random", "retain", 42)).cell.train
    assert retain.write_after.texts == [0, 1, 2, 4] and retain.contrast is None
    assert retain.init_adapter.endswith("adapters/tiny-random/remember/seed42")


@pytest.mark.slow
def test_the_recipe_trains(config):
    folder = train_cell(config, "tiny-random", "remember", 42)
    curve = list(csv.DictReader((folder / "curve.csv").open()))
    assert len(curve) == 4 and all(row["repeat_nll"] for row in curve)
    assert [bool(row["contrast"]) for row in curve] == [True, True, False, False]
    answer = [
        sum(float(row[name]) * weight for name, weight in (("answer_nll", 1), ("repeat_nll", 0.5))) for row in curve
    ]
    assert [float(row["loss"]) for row in curve[2:]] == pytest.approx(answer[2:], abs=1e-3)


def test_a_chat_goes_on_from_the_texts_with_what_is_told_asked_and_replied(prepare, tmp_path):
    own = {"train_conversations": 40, "eval_conversations": 8, "word_files": [str(tmp_path / "squad.json")]}
    sources = {"conversations": own, "facts": {"train_papers": 8, "eval_papers": 4}}
    limits = {"max_written_tokens": 1024, "max_read_tokens": 256, "processes": 1}
    config = prepare(["remember_chat.yaml"], ("sentences", "paragraphs"), sources=sources, data=limits)
    rows = open_episodes(Layout(config).data("tiny-random", "train")).select(["source", "answer_type"]).to_pylist()
    found = {name: {row["answer_type"] for row in rows if row["source"] == name} for name in config.data.sources}
    assert found["conversations"] == {"told", "unknown", "reply"} and all(found.values())
    assert found["ordinary"] == found["requests"] == {"reply", "first_reply"}
    recipe = recipe_of(config, config.cell("tiny-random", "chat", 42))
    places = [next(n for n, row in enumerate(rows) if row["source"] == name) for name in ("conversations", "ordinary")]
    batch = recipe.collate(recipe.episodes()[0], [[place] for place in places])
    kept = batch.answer_rows == 1
    assert torch.equal(batch.kept, batch.answer_weights * kept) and kept.any()
    assert batch.answer_weights[~kept].max() == pytest.approx(3 * batch.answer_weights[~kept].min())  # of the value
    cell = config.cell("tiny-random", "chat", 42)
    start, _ = load_adapter(PROJECT_ROOT / cell.train.init_adapter)
    assert cell.train.write_questions and start.num_states == cell.strategy.adapter["num_states"] == 8
