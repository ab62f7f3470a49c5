"""The LoRA baselines as models."""

import json

import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from deltamem.chat.format import encode_messages
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.config.strategies import LoraStrategy
from pipelines.data.shards import SCHEMA
from pipelines.errors import StageError
from pipelines.strategies.lora import (
    PromptObjective,
    collate_prompts,
    fill,
    fill_from,
    load_lora,
    make_lora,
    read_config,
    save_lora,
    size,
    trainable,
)
from pipelines.training.one_parameter import OneParameter


def lora(**changes):
    return LoraStrategy(**{"kind": "lora", "context": True, **changes})


@pytest.fixture
def base(tiny_model):
    return tiny_model("qwen3", tokenizer=byte_tokenizer())


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


def test_a_training_starts_from_a_saved_one(tiny_model, base, episodes, tmp_path):
    tokenizer = byte_tokenizer()
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, context=True)
    model = make_lora(base, lora(rank=4))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(0, 0.1)
    save_lora(model, tmp_path)
    fresh = PromptObjective(make_lora(tiny_model("qwen3", tokenizer=tokenizer), lora(rank=4)))
    assert fresh(batch).loss.item() != PromptObjective(model)(batch).loss.item()
    fill_from(fresh, tmp_path)
    assert fresh(batch).loss.item() == PromptObjective(model)(batch).loss.item()
    saved = read_config(tmp_path)
    assert saved.r == 4 and sorted(saved.target_modules) == ["k_proj", "o_proj", "q_proj", "v_proj"]


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
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"], "in the same order every time"
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
                "source": "papers",
                "prompt": [asked],
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.mark.parametrize("with_context", [True, False])
def test_its_prompt_has_the_context_or_not(episodes, with_context):
    tokenizer = byte_tokenizer()
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, with_context)
    for row, ids in zip(episodes.to_pylist(), batch.input_ids, strict=True):
        text = tokenizer.decode(ids[ids != tokenizer.pad_token_id])
        chat = [*(row["messages"] if with_context else []), {"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == prompt + row["answer"] + "<|im_end|>"
    assert not batch.context_mask.any()  # nothing is to be written
    assert batch.tokens == int((batch.input_ids != tokenizer.pad_token_id).sum())


def test_training_it_lowers_the_loss_and_the_masters_go_back_into_the_model(base, tiny_model, episodes):
    tokenizer = byte_tokenizer()
    batch = collate_prompts(episodes, [[0], [1]], tokenizer, context=True)
    model = make_lora(base, lora())
    objective = PromptObjective(model)
    assert all(name.startswith("adapter.") for name, _ in objective.named_parameters())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = objective(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    tensors = {name.removeprefix("adapter."): p.detach().clone() for name, p in objective.named_parameters()}
    fresh = make_lora(tiny_model("qwen3", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id), lora())
    fill(fresh, tensors)
    assert PromptObjective(fresh)(batch).loss.item() == pytest.approx(objective(batch).loss.item(), abs=1e-5)


def test_pieces_of_one_parameter_learn_what_its_own_do(base, episodes):
    batch = collate_prompts(episodes, [[0], [1]], byte_tokenizer(), context=True)
    objective = PromptObjective(make_lora(base, lora()).eval())
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(0, 0.1)
    loss = objective(batch).loss
    expected = torch.autograd.grad(loss, list(objective.parameters()))
    module = OneParameter(objective)
    found = module(batch).loss
    found.backward()
    assert found.item() == loss.item() and not any(parameter.grad is not None for parameter in objective.parameters())
    for ours, theirs in zip(module.pieces(module.whole.grad).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


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
    assert PromptObjective(model)(batch).loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-4)
