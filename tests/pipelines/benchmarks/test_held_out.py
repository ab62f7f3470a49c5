"""What the sources hold out: asked by source, written as training writes it, and nothing in a prompt twice."""

import json

import pytest

from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.benchmarks import get_benchmark
from pipelines.benchmarks.base import prompt_messages
from pipelines.config import resolve_config
from pipelines.data.shards import open_episodes
from pipelines.errors import StageError
from pipelines.evaluation.prompts import PromptEncoder
from pipelines.preprocess import preprocess
from pipelines.run.layout import Layout

ROLES = ("user", "assistant") * 2
CHATS = [["I like tea.", "Good.", f"What do I like? {n}", "You like tea."] for n in range(4)]


@pytest.fixture
def held_out(tmp_path):
    """The benchmark over episodes of a mixture, and its configuration; call it with the chats' own keys."""

    def make(chats=CHATS, **changes):
        records = [{"messages": [{"role": role, "content": text} for role, text in zip(ROLES, chat, strict=False)]}
                   for chat in chats]  # fmt: skip
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
        sources = {
            "chats": {"kind": "chat", "train_files": [str(tmp_path / "chats.jsonl")], "eval_share": 0.5} | changes,
            "facts": {"kind": "generated", "train_papers": 1, "eval_papers": 2, "facts_per_paper": 2},
        }
        settings = {"name": "run", "results_dir": str(tmp_path / "results"), "data": {"sources": sources}}
        settings |= {"backbones": ["tiny-random"], "strategies": ["tsw"], "benchmarks": ["held_out"]}
        settings["register"] = {"champion_metric": "held_out/memory_effect_nll"}
        config = resolve_config(settings, "test")
        byte_tokenizer().save_pretrained(Layout(config).backbone("tiny-random"))
        preprocess(config, "tiny-random")
        episodes = Layout(config).data("tiny-random", "eval")
        return get_benchmark("held_out", config.entry("benchmarks", "held_out"), episodes), open_episodes(episodes)

    return make


def texts(messages):
    return [message["content"] for message in messages]


def test_every_held_out_episode_is_asked_by_its_source(held_out):
    benchmark, episodes = held_out()
    contexts = list(benchmark.contexts())
    asked = [question for context in contexts for question in context.questions]
    assert [q.question_id for q in asked] == episodes["question_id"].to_pylist()
    assert [q.category for q in asked] == ["chats"] * 2 + ["facts"] * 6
    assert [len(context.questions) for context in contexts] == [1, 1, 3, 3]
    assert all(benchmark.score(q, q.references[0]) == {"f1": 1} for q in asked if q.category == "chats")
    assert benchmark.max_new_tokens == 64


@pytest.mark.parametrize("write", ["earlier", "all"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_memory_is_written_from_the_tokens_that_training_writes(held_out, write, system):
    benchmark, episodes = held_out(write=write, system_prompt=system)
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer, "message", 4096)
    rows = {row["question_id"]: row for row in episodes.to_pylist()}
    for context in benchmark.contexts():
        for question in context.questions:
            row = rows[question.question_id]
            (written,) = encoder.history(context.to_write)
            assert (written.input_ids, written.segment_ids) == (row["context_ids"], row["segment_ids"])
            assert encoder.question(question).input_ids == row["question_ids"]
            assert encoder.answer(question) == row["answer_ids"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_visible_messages_that_are_written_too_stand_in_a_prompt_once(held_out, system):
    benchmark, _ = held_out(write="all", visible=2, system_prompt=system)
    first, *_ = benchmark.contexts()
    (question,) = first.questions
    asked = texts(question.messages)[-1]
    chat = [*([system] if system else []), "I like tea.", "Good.", asked]
    assert texts(first.to_write) == chat
    assert texts(prompt_messages(question, first.history)) == chat


def test_a_chat_of_which_all_is_visible_has_a_memory_and_no_history(held_out):
    benchmark, _ = held_out(chats=[["Hi.", "Hello."], ["Ho.", "Hello."]], write="all")
    (context,) = [context for context in benchmark.contexts() if context.questions[0].category == "chats"]
    assert context.history == [] and len(context.to_write) == 1


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_s_first_reply_is_asked_without_a_memory(held_out, system):
    chats = [["Hi.", "Hello."], ["Ho.", "Hello."], *CHATS]
    benchmark, episodes = held_out(chats=chats, first_replies=True, system_prompt=system, eval_share=0.99)
    rows = {row["question_id"]: row for row in episodes.to_pylist() if row["answer_type"] == "first_reply"}
    found = [context for context in benchmark.contexts() if context.questions[0].question_id in rows]
    assert found and all(context.to_write == context.history == [] for context in found)
    for context in found:
        (question,) = context.questions
        row = rows[question.question_id]
        assert (row["context_ids"], row["segment_ids"], row["messages"]) == ([], [], [])
        prompt = PromptEncoder(byte_tokenizer(), "message", 4096).question(question)
        assert prompt.input_ids == row["question_ids"]
        assert texts(question.messages)[:-1] == ([system] if system else [])


def test_without_episodes_it_says_what_to_run(tmp_path):
    config = {"kind": "held_out", "version": 1}
    settings = resolve_config(
        {"name": "r", "backbones": ["tiny-random"], "strategies": ["tsw"], "benchmarks": {"held_out": config},
         "data": {"sources": ["generated"]}, "register": {"champion_metric": "held_out/memory_effect_nll"}}, "test"
    ).entry("benchmarks", "held_out")  # fmt: skip
    with pytest.raises(StageError, match="no episodes here.*run the preprocess stage"):
        list(get_benchmark("held_out", settings, tmp_path).contexts())
