"""The baselines: what each leaves of a history, and the LoRA ones as models."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForTokenClassification,
    BertTokenizer,
)

from deltamem.chat_format import encode_messages
from pipelines import parts
from pipelines.backbone import load_backbone
from pipelines.backbone_sources.random_weights import byte_tokenizer
from pipelines.baselines import context_transform
from pipelines.baselines.compression import LlmLingua2
from pipelines.baselines.lora import (
    PromptObjective,
    collate_prompts,
    fill,
    load_lora,
    make_lora,
    save_lora,
    size,
    trainable,
)
from pipelines.baselines.memory_bank import MemoryBank
from pipelines.baselines.passages import Index, best
from pipelines.baselines.retrieval import Bm25
from pipelines.baselines.settings import Bm25Strategy, LlmLingua2Strategy, LoraStrategy, MemoryBankStrategy
from pipelines.benchmarks import Context, Question
from pipelines.config import resolve_config
from pipelines.errors import StageError
from pipelines.evaluate import evaluate
from pipelines.layout import Layout
from pipelines.preprocess import preprocess
from pipelines.shards import SCHEMA

STORY = [
    "DATE: 1 May\nAnn adopted a grey cat. " + "She likes it a lot. " * 12 + "The cat is called Tiger.",
    "DATE: 2 May\nBo bought a red car.",
    "DATE: 3 May\nAnn and Bo went sailing on the lake.",
]


def context(*asked):
    questions = [
        Question(f"q{n}", "doc", [{"role": "user", "content": f"Answer: {text}"}], ["x"], asked=text)
        for n, text in enumerate(asked)
    ]
    return Context("c", [{"role": "user", "content": text} for text in STORY], questions)


def texts(made):
    return [message["content"] for message in made.history]


# --- retrieval ------------------------------------------------------------------------------------------


def test_bm25_gives_every_question_the_passages_that_share_its_words():
    settings = Bm25Strategy(kind="bm25", top_k=1, passage_characters=1000)
    car, lake = Bm25(settings)(context("What colour is the car?", "Who went sailing?"))
    assert texts(car) == [STORY[1]]
    assert texts(lake) == [STORY[2]]
    assert (car.context_id, [q.question_id for q in car.questions]) == ("q0", ["q0"])
    assert car.questions[0].cluster_id == "doc"


def test_a_long_message_is_cut_under_its_first_line_and_order_is_kept():
    settings = Bm25Strategy(kind="bm25", top_k=2, passage_characters=120)
    (made,) = Bm25(settings)(context("Tiger cat, red car?"))
    first, second = texts(made)
    assert first.startswith("DATE: 1 May\n") and first.endswith("The cat is called Tiger.")
    assert second == STORY[1]


def test_the_scores_are_okapis():
    documents = ["a b", "a c c", "d"]
    found = Index([{"role": "user", "content": text} for text in documents], 100).relevance("c d")
    average = 2.0
    for number, word, count in ((1, "c", 2), (2, "d", 1)):
        idf = math.log((3 - 1 + 0.5) / (1 + 0.5))
        length = len(documents[number].split())
        expected = idf * count * 2.5 / (count + 1.5 * (1 - 0.75 + 0.75 * length / average))
        assert found[number] == pytest.approx(expected), word
    assert found[0] == 0


@pytest.mark.parametrize("history", [[], [{"role": "user", "content": "  "}], [{"role": "user", "content": "?!"}]])
def test_a_history_without_words_is_no_problem(history):
    made = context("Who?")
    empty = Context("c", history, made.questions)
    (found,) = Bm25(Bm25Strategy(kind="bm25"))(empty)
    assert "".join(texts(found)) == "".join(m["content"].strip() for m in history)


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), st.integers(1, 6))
def test_the_best_are_the_highest_in_their_order(scores, count):
    chosen = best(np.array(scores), count)
    assert chosen == sorted(chosen)
    assert sorted((scores[n] for n in chosen), reverse=True) == sorted(scores, reverse=True)[:count]


# --- MemoryBank -----------------------------------------------------------------------------------------


def memory_bank(**changes):
    asked = []

    def summarise(contents, limit):
        asked.append((list(contents), limit))
        return [f"summary {number}" for number in range(len(contents))]

    options = {"kind": "memory_bank", "top_k": 1, "passage_characters": 1000, "lifetime": 1.0, **changes}
    return MemoryBank(MemoryBankStrategy(**options), summarise), asked


def test_memory_bank_puts_summaries_of_all_sessions_first():
    bank, asked = memory_bank(summary_tokens=30)
    (made,) = bank(context("Which car?"))
    assert texts(made)[0] == "Summary of what happened, in order:\n1. summary 0\n2. summary 1\n3. summary 2"
    assert texts(made)[1:] == [STORY[1]]
    assert asked == [(STORY, 30)]
    bank, asked = memory_bank(summary_tokens=0)
    (made,) = bank(context("Which car?"))
    assert texts(made) == [STORY[1]] and asked == []


def test_what_is_old_fades_and_what_is_recalled_stays():
    story = [{"role": "user", "content": text} for text in ("the cat sat", "nothing here", "the cat ran")]
    made = [
        Question(f"q{n}", "d", [{"role": "user", "content": t}], ["x"]) for n, t in enumerate(["cat", "sat", "cat"])
    ]
    bank, _ = memory_bank(summary_tokens=0)
    found = [texts(one)[0] for one in bank(Context("c", story, made))]
    # equally relevant, the newer one wins; the older one alone has "sat"; then both were recalled once
    assert found == ["the cat ran", "the cat sat", "the cat sat"]


# --- LLMLingua-2 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A stand-in for LLMLingua-2's classifier that keeps words with an upper-case X and drops the others.

    The package tells by the folder's name which tokenizer it has to do with.
    """
    folder = tmp_path_factory.mktemp("classifier") / "bert-base-multilingual-cased-stand-in"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "drop", "Xkeep", "Xstay", "DATE", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=2,
    )
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1)
        for layer in model.bert.encoder.layer:
            layer.attention.output.LayerNorm.weight.fill_(1)
            layer.output.LayerNorm.weight.fill_(1)
        embedding = model.bert.embeddings.word_embeddings.weight
        embedding[:, 0] = torch.tensor([5.0 if word.startswith("X") else -5.0 for word in words])
        model.classifier.weight[1, 0] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def word_counts(monkeypatch):
    """tiktoken's real encoder over bytes, in place of the vocabulary that it would download."""
    import tiktoken

    encoder = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoder)


def test_llmlingua_keeps_the_words_that_the_classifier_wants(classifier, word_counts):
    compress = LlmLingua2(LlmLingua2Strategy(kind="llmlingua2", model=str(classifier), rate=0.5), "cpu")
    made = context("What?", "And what?")
    history = ["Xkeep drop Xstay drop drop", "drop drop Xkeep drop"]
    made = Context("c", [{"role": "user", "content": text} for text in history], made.questions)
    (short,) = compress(made)
    assert texts(short) == ["Xkeep Xstay", "Xkeep"]
    assert short.questions == made.questions
    assert list(compress(Context("c", [], made.questions))) == [Context("c", [], made.questions)]


def test_llmlinguas_classifier_out_of_reach_says_what_to_do(tmp_path, word_counts):
    settings = LlmLingua2Strategy(kind="llmlingua2", model=str(tmp_path / "none"))
    with pytest.raises(StageError, match="classifier.*give a folder that holds it as 'model'"):
        LlmLingua2(settings, "cpu")


def test_every_kind_has_its_transform(classifier, word_counts):
    kinds = {
        Bm25: Bm25Strategy(kind="bm25"),
        MemoryBank: MemoryBankStrategy(kind="memory_bank"),
        LlmLingua2: LlmLingua2Strategy(kind="llmlingua2", model=str(classifier)),
    }
    for made, strategy in kinds.items():
        assert isinstance(context_transform(strategy, lambda contents, limit: [], "cpu"), made)


# --- LoRA -----------------------------------------------------------------------------------------------


def lora(**changes):
    return LoraStrategy(**{"kind": "lora", "context": True, **changes})


@pytest.fixture
def base(tiny_model):
    tokenizer = byte_tokenizer()
    return tiny_model("qwen3", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)


def test_on_qwen3_4b_it_has_the_papers_5_9_million_parameters():
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=8,
    )
    with torch.device("meta"):
        model = make_lora(AutoModelForCausalLM.from_config(config), lora())
    assert size(model) == 5_898_240


def test_a_new_lora_changes_nothing_and_only_it_is_trained(base):
    ids = torch.arange(12)[None]
    before = base(ids).logits
    model = make_lora(base, lora())
    assert torch.equal(model(ids).logits, before)
    assert {name.split(".")[-4] for name in trainable(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(p.numel() for p in trainable(model).values()) == size(model)


def test_modules_that_are_not_there_are_named(base):
    with pytest.raises(StageError, match="qkv_proj.*target_modules"):
        make_lora(base, lora(target_modules=["qkv_proj"]))


def test_saved_and_loaded_it_is_the_same(tiny_model, base, tmp_path):
    model = make_lora(base, lora()).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_()
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    save_lora(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh = tiny_model("qwen3", vocab_size=len(byte_tokenizer()), pad_token_id=base.config.pad_token_id)
    loaded = load_lora(fresh, tmp_path)
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_damaged_or_missing_lora_is_named(base, tmp_path):
    with pytest.raises(StageError, match="adapter_config.json is missing"):
        load_lora(base, tmp_path)
    save_lora(make_lora(base, lora()), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StageError, match="doesn't fit the backbone.*train it again"):
        load_lora(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(StageError, match="adapter_model.safetensors is missing"):
        load_lora(base, tmp_path)


@pytest.fixture
def episodes():
    tokenizer = byte_tokenizer()
    rows = []
    for number, (colour, question) in enumerate([("red", "Which colour?"), ("blue", "And which is it?")]):
        messages = [{"role": "user", "content": f"The ball is {colour}."}] * (number + 1)
        asked = {"role": "user", "content": question}
        context = encode_messages(tokenizer, messages)
        rows.append(
            {
                "paper_id": str(number),
                "question_id": f"q{number}",
                "context_ids": context.input_ids,
                "segment_ids": context.segment_ids,
                "messages": messages,
                "question": question,
                "question_ids": encode_messages(tokenizer, [asked], True).input_ids,
                "answer_ids": tokenizer.encode(colour + "<|im_end|>"),
                "answer": colour,
                "references": [colour],
                "answer_type": "extractive",
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("with_context", [True, False])
def test_its_prompt_has_the_context_or_not(episodes, with_context):
    tokenizer = byte_tokenizer()
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, with_context)
    for row, ids, mask in zip(episodes.to_pylist(), batch.input_ids, batch.attention_mask, strict=True):
        text = tokenizer.decode(ids[mask.bool()])
        chat = [*(row["messages"] if with_context else []), {"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == prompt + row["answer"] + "<|im_end|>"
    assert batch.context_ids.numel() == 0
    assert batch.tokens == int(batch.attention_mask.sum())


def test_training_it_lowers_the_loss_and_the_masters_go_back_into_the_model(base, tiny_model, episodes):
    tokenizer = byte_tokenizer()
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, context=True)
    model = make_lora(base, lora())
    objective = PromptObjective(model)
    assert all(name.startswith("adapter.") for name, _ in objective.named_parameters())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    tensors = {name.removeprefix("adapter."): p.detach().clone() for name, p in objective.named_parameters()}
    fresh = make_lora(tiny_model("qwen3", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id), lora())
    fill(fresh, tensors)
    assert PromptObjective(fresh)(batch).item() == pytest.approx(objective(batch).item(), abs=1e-5)


def test_the_loss_is_the_mean_over_questions_of_the_likelihood_per_token(base, episodes):
    tokenizer = byte_tokenizer()
    model = make_lora(base, lora()).eval()
    expected = []
    for row in episodes.to_pylist():
        ids = torch.tensor([row["question_ids"] + row["answer_ids"]])
        logits = model(ids).logits[0].log_softmax(-1)
        start = len(row["question_ids"])
        expected.append(-logits[start - 1 : -1].gather(1, ids[0, start:, None]).mean())
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, context=False)
    assert PromptObjective(model)(batch).item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)


# --- as cells of an evaluation --------------------------------------------------------------------------


@pytest.mark.slow
def test_they_are_evaluated_like_the_strategies(tmp_path, tiny_backbone):
    settings = {
        "name": "run",
        "results_dir": str(tmp_path),
        "backbones": ["tiny-random"],
        "strategies": {
            "bm25": {"kind": "bm25", "top_k": 1, "passage_characters": 200},
            "bank": {"kind": "memory_bank", "top_k": 1, "passage_characters": 200, "summary_tokens": 4},
            "lora": {"kind": "lora", "context": True},
        },
        "benchmarks": ["qasper"],
        "data": {
            "source": "generated",
            "generated": {"train_papers": 1, "eval_papers": 2, "facts_per_paper": 1},
            "processes": 1,
        },
        "evaluate": {"use_gpu": False, "max_new_tokens": 3, "bootstrap_samples": 100},
    }
    config = resolve_config(settings, "test")
    layout = Layout(config)
    layout.backbone("tiny-random").parent.mkdir(parents=True)
    layout.backbone("tiny-random").symlink_to(tiny_backbone)
    preprocess(config, "tiny-random")
    assert parts.cells(config) == [("tiny-random", "lora", 42)]
    cells = {("frozen", 0), ("bm25", 0), ("bank", 0), ("lora", 42)}
    assert {(strategy, seed) for _, strategy, seed, _ in parts.evaluations(config)} == cells

    torch.manual_seed(0)
    backbone, _ = load_backbone(layout.backbone("tiny-random"))
    save_lora(make_lora(backbone, config.strategies["lora"]), layout.adapter("tiny-random", "lora", 42))
    results = {strategy: evaluate(config, "tiny-random", strategy, seed, "qasper", limit=2) for strategy, seed in cells}
    assert list(results["bm25"]["conditions"]) == list(results["bank"]["conditions"]) == ["full"]
    nll = {name: result["conditions"]["full"]["nll"]["value"] for name, result in results.items()}
    assert len({round(nll[name], 6) for name in ("frozen", "bm25", "bank")}) == 3
    assert nll["lora"] == pytest.approx(nll["frozen"], rel=1e-3)  # untrained, it changes nothing
    assert {"memory_bank", "full"} == set(results["bank"]["cost"]["parts"])
    with pytest.raises(StageError, match="no LoRA adapter|no adapter to evaluate"):
        layout.adapter_weights("tiny-random", "lora", 42).unlink()
        evaluate(config, "tiny-random", "lora", 42, "qasper", limit=2)
    with pytest.raises(StageError, match="'bm25' .bm25. has nothing to train"):
        config.cell("tiny-random", "bm25", 42)
