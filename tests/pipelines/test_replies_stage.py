"""The frozen backbone's own replies as chats to train on: asked once, alone, and learnt with a memory that is full."""

import json

import pytest
import torch

from pipelines import replies
from pipelines.backbone import prepare_backbone
from pipelines.backbones.prepared import load_backbone, load_tokenizer
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.config import resolve_config
from pipelines.data.conversations import conversations
from pipelines.errors import StageError
from pipelines.preprocess import open_episodes, preprocess
from pipelines.replies import make_replies
from pipelines.run import parts
from pipelines.run.layout import Layout

BACKBONE, LIMIT = "tiny", 3
SAID = [f"What is {word}?" for word in ("tea", "a boat", "the moon", "gravity", "a verb", "rain", "snow", "a fjord")]


@pytest.fixture
def configure(tmp_path, tiny_model):
    """A run whose backbone is there, a tiny one for which every third byte ends a reply."""
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen3", tokenizer=tokenizer)
    model.generation_config.eos_token_id = list(range(0, 256, 3))
    for made in (model, tokenizer):
        made.save_pretrained(tmp_path / "tiny")
    entry = {"source": "local", "path": str(tmp_path / "tiny"), "dtype": "float32"}

    def configure(**changes):
        asked = tmp_path / "asked.jsonl"
        asked.write_text("".join(json.dumps({"prompt": text, "response": "-"}) + "\n" for text in [*SAID, SAID[0]]))
        source = {"kind": "replies", "asked": [{"file": str(asked)}], "eval_prompts": 3, "max_new_tokens": LIMIT}
        data = {"sources": {"ordinary": source | changes}, "max_read_tokens": 200, "processes": 1}
        names = {"backbones": {BACKBONE: entry}, "strategies": ["tsw"], "benchmarks": ["held_out"]}
        evaluate = {"use_gpu": False, "batch_size": 2}
        settings = {"name": "run", "results_dir": str(tmp_path / "results"), "data": data, "evaluate": evaluate}
        settings["register"] = {"champion_metric": "held_out/memory_effect_nll"}
        config = resolve_config(settings | names, "test")
        prepare_backbone(BACKBONE, config.backbones[BACKBONE], Layout(config).backbone(BACKBONE))
        return config

    return configure


def chats(config, split):
    file = Layout(config).replies(BACKBONE, "ordinary") / f"{split}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def says(config, text):
    """What transformers' own generation makes of a prompt, and whether it comes to an end."""
    model, tokenizer = load_backbone(Layout(config).backbone(BACKBONE))
    prompt = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    ends = [*model.generation_config.eos_token_id, tokenizer.eos_token_id]
    finished = made[-1] in ends
    return tokenizer.decode(made[:-1] if finished else made, skip_special_tokens=True).strip(), finished


def test_every_text_is_asked_alone_and_its_reply_learnt_after_a_conversation(configure):
    config = configure()
    record = make_replies(config, BACKBONE, "ordinary")
    preprocess(config, BACKBONE)
    assert {split: found["asked"] for split, found in record["chats"].items()} == {"train": 5, "eval": 3}
    found, finished = {}, {}
    for split, asked in (("train", 5), ("eval", 3)):
        told = list(conversations(asked, 0, split))
        for chat in chats(config, split):
            *before, said, reply = chat["messages"]
            assert before == told[int(chat["id"].removeprefix(f"{split}-"))]["messages"]
            found[said["content"]] = reply["content"], chat["finished"]
        rows = open_episodes(Layout(config).data(BACKBONE, split)).to_pylist()
        assert [row["answer"] for row in rows] == [chat["messages"][-1]["content"] for chat in chats(config, split)]
        end = load_tokenizer(Layout(config).backbone(BACKBONE)).eos_token_id
        assert [row["answer_ids"][-1] == end for row in rows] == [chat["finished"] for chat in chats(config, split)]
        assert all(end not in row["answer_ids"][:-1] for row in rows)
        finished[split] = sum(chat["finished"] for chat in chats(config, split))
    assert finished == {split: counted["finished"] for split, counted in record["chats"].items()}
    assert found == {text: reply for text in SAID if (reply := says(config, text))[0]}
    assert 2 < sum(finished.values()) < len(found)


def test_a_share_of_the_chats_begins_with_what_is_asked(configure):
    plain, config = configure(), configure(first_share=0.5)
    assert "first_share" not in parts.replies(plain, "ordinary")["replies"]  # as before there was one
    assert parts.replies(plain, "ordinary") != parts.replies(config, "ordinary")
    make_replies(plain, BACKBONE, "ordinary")
    before = {split: chats(plain, split) for split in ("train", "eval")}
    record = make_replies(config, BACKBONE, "ordinary")
    preprocess(config, BACKBONE)
    for split, found in record["chats"].items():
        made = chats(config, split)
        assert found["first"] == len(made) // 2 == sum(len(chat["messages"]) == 2 for chat in made)
        for ours, theirs in zip(made, before[split], strict=True):
            assert ours == (theirs if len(ours["messages"]) > 2 else {**theirs, "messages": theirs["messages"][-2:]})
        rows = open_episodes(Layout(config).data(BACKBONE, split)).to_pylist()
        assert [not row["context_ids"] for row in rows] == [len(chat["messages"]) == 2 for chat in made]
        assert [row["answer"] for row in rows] == [chat["messages"][-1]["content"] for chat in made]
    assert any(found["first"] for found in record["chats"].values())


def test_what_is_held_out_stays_so_when_more_is_asked_for_training(configure):
    few, many = configure(train_prompts=2), configure()
    make_replies(few, BACKBONE, "ordinary")
    before = [chats(few, split) for split in ("eval", "train")]
    make_replies(many, BACKBONE, "ordinary")
    assert [chats(many, "eval"), chats(many, "train")[: len(before[1])]] == before
    weighed = configure(weight=3.0)
    assert parts.replies(weighed, "ordinary") == parts.replies(many, "ordinary") != parts.replies(few, "ordinary")


def test_an_interrupted_job_asks_what_is_left_and_ends_in_the_same_chats(configure, monkeypatch):
    config = configure()
    make_replies(config, BACKBONE, "ordinary")
    whole = [chats(config, split) for split in ("train", "eval")]
    asked, ask = [], replies.own_replies

    def ends_at_the_third_batch(batch, *parts):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(batch)
        return ask(batch, *parts)

    monkeypatch.setattr(replies, "own_replies", ends_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        make_replies(config, BACKBONE, "ordinary")
    assert [chats(config, split) for split in ("train", "eval")] == whole, "what was there stays until there is another"
    first = asked.copy()
    asked.clear()
    make_replies(config, BACKBONE, "ordinary")
    assert len(first) == 4 and sorted(first + asked) == sorted(SAID)
    assert [chats(config, split) for split in ("train", "eval")] == whole


def test_what_is_asked_is_said_where_it_can_not_be(configure):
    with pytest.raises(StageError, match="8 texts in all, and eval_prompts takes 8"):
        make_replies(configure(eval_prompts=8), BACKBONE, "ordinary")
    with pytest.raises(StageError, match="no entry 'else'"):
        make_replies(configure(), BACKBONE, "else")
    config = configure(seed=1)
    with pytest.raises(StageError, match=r"data.sources.ordinary: .*replies.json.*Run `python -m pipelines.replies`"):
        preprocess(config, BACKBONE)
