"""MemGen: where latents lie, which logits count, and that an answer in batches is the answer by itself."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from deltamem.chat.messages import EncodedMessages
from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.config.strategies import MemGenStrategy
from pipelines.errors import StageError
from pipelines.evaluate import evaluate
from pipelines.evaluation.passes import reader_of
from pipelines.registry.registration import register_cell
from pipelines.run.layout import Layout
from pipelines.strategies.memgen import MemGen, ends_of
from pipelines.strategies.memgen_reader import EvaluatedMemGen
from pipelines.strategies.memgen_recipe import MemGenObjective, load_memgen
from pipelines.train import train_cell
from pipelines.training.batches import collate
from pipelines.training.one_parameter import OneParameter
from tests.pipelines.generated_run import prepare_run
from tests.pipelines.training.episodes import episodes

PROMPT_LATENTS, ANSWER_LATENTS, INSERTIONS = 3, 2, 2
END = 7
"""The token after which latents are inserted."""


def settings(**changes):
    return MemGenStrategy(**{
        "kind": "memgen", "prompt_latents": PROMPT_LATENTS, "answer_latents": ANSWER_LATENTS, "rank": 4,
        "insertions": INSERTIONS, **changes,
    })  # fmt: skip


@pytest.fixture
def memgen(tiny_model):
    torch.manual_seed(0)
    base = tiny_model("qwen3")
    ends = torch.zeros(base.config.vocab_size, dtype=torch.bool)
    ends[END] = True
    found = EvaluatedMemGen(base, settings(), ends)
    with torch.no_grad():
        for parameter in found.weaver.parameters():
            parameter.normal_(0, 0.3)
    found.model.eval()
    return found


def test_on_qwen3_4b_it_has_about_19_million_parameters():
    config = AutoConfig.for_model(
        "qwen3", hidden_size=2560, intermediate_size=8, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        found = MemGen(AutoModelForCausalLM.from_config(config), MemGenStrategy(kind="memgen"), torch.zeros(0))
    linear, lora = 2 * (2560 * 2560 + 2560), 16 * 36 * ((2560 + 4096) + (2560 + 1024))
    queries = 16 * 2560 + 2 * (2 * 2560 + 1)
    assert sum(p.numel() for p in found.weaver.parameters()) == linear + lora + queries == 19_061_762


def test_tokens_that_end_in_a_comma_a_full_stop_or_a_line_break_are_ends():
    tokenizer = byte_tokenizer()
    found = ends_of(tokenizer, len(tokenizer) + 5)
    assert len(found) == len(tokenizer) + 5
    assert {tokenizer.decode([token]) for token in found.nonzero()[:, 0].tolist()} == {",", ".", "\n"}


@torch.no_grad()
def test_latents_lie_at_the_prompts_end_and_after_the_first_ends_of_the_answer(memgen):
    prompt, answer = [5, END, 9], [8, END, 4, 6, END, 5, END, 9]  # a third end, and one of the prompt, get none
    (woven,) = memgen.woven([prompt], [answer])
    latents = [3, 4, 5, 8, 9, 13, 14]
    tokens = [place for place in range(len(woven.embeddings)) if place not in latents]
    assert torch.equal(woven.embeddings[tokens], memgen.embed(prompt + answer))
    assert woven.before.tolist() == [place - 1 for place in tokens[len(prompt) :]]
    assert memgen.places([8, END]) == [] and memgen.places([END, 8]) == [1]  # none after the last token

    def latents_after(length, queries):
        read = woven.embeddings[:length]
        asked = F.layer_norm(queries.vectors, queries.vectors.shape[1:], queries.norm.weight, queries.norm.bias)
        whole = torch.cat([memgen.weaver.into(read), queries.scale * asked])[None]
        states = memgen.model(inputs_embeds=whole, output_hidden_states=True).hidden_states[-1]
        return memgen.weaver.back(states[0, length:])

    for length, queries in ((3, memgen.weaver.prompt), (8, memgen.weaver.answer), (13, memgen.weaver.answer)):
        expected = latents_after(length, queries)
        found = woven.embeddings[length : length + len(queries.vectors)]
        assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_the_loss_counts_the_answers_tokens_each_from_the_place_before_it(memgen):
    table = episodes([1, 2], width=lambda paper: 2)
    batch = collate(table, [[0], [1, 2]], 0)
    memgen.ends[8] = True  # the first token of the longer answers
    result = MemGenObjective(memgen)(batch)
    expected = []
    for row in table.to_pylist():
        (woven,) = memgen.woven([row["question_ids"]], [row["answer_ids"]])
        with memgen.model.disable_adapter():
            logits = memgen.base(inputs_embeds=woven.embeddings[None]).logits[0, woven.before]
        expected.append(F.cross_entropy(logits, torch.tensor(row["answer_ids"]), reduction="none"))
    assert torch.allclose(result.token_nll, torch.cat(expected), atol=1e-5)
    assert result.loss.item() == pytest.approx(torch.stack([one.mean() for one in expected]).mean().item(), rel=1e-5)


def test_only_the_weaver_is_trained_and_all_of_it(memgen):
    objective = MemGenObjective(memgen)
    memgen.ends[8] = True
    objective(collate(episodes([2]), [[0, 1]], 0)).loss.backward()
    assert all(name.startswith("adapter.") for name, _ in objective.named_parameters())
    untouched = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert untouched == []
    assert not [name for name, p in memgen.base.named_parameters() if p.grad is not None and "lora" not in name]


def test_pieces_of_one_parameter_learn_what_the_weavers_own_do(memgen):
    memgen.ends[8] = True
    batch, objective = collate(episodes([2]), [[0, 1]], 0), MemGenObjective(memgen)
    expected = torch.autograd.grad(objective(batch).loss, list(objective.parameters()))
    module = OneParameter(objective)
    module(batch).loss.backward()
    assert not any(parameter.grad is not None for parameter in objective.parameters())
    for ours, theirs in zip(module.pieces(module.whole.grad).values(), expected, strict=True):
        assert theirs.count_nonzero()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradients(memgen):
    def gradients():
        objective = MemGenObjective(memgen)
        objective.zero_grad()
        torch.manual_seed(0)
        memgen.model.train()
        objective(batch).loss.backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters()}

    memgen.ends[8] = True
    batch = collate(episodes([2]), [[0, 1]], 0)
    expected = gradients()
    memgen.recompute_activations()
    runs = []
    memgen.base.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients()
    assert len(runs) == 2 * 3  # the weaver's two and the reasoner's, each once more in the backward pass
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)


@torch.no_grad()
def test_answers_side_by_side_are_those_of_one_prompt_recomputed_at_every_token(memgen):
    memgen.ends[::3] = True  # many, so that rows insert at different moments
    prompts, limits, stop = [[5, 6, 8], [9], [11, 4, 5, 6, 10]], [9, 6, 9], 10**9
    reader = reader_of(memgen, [stop], 0)
    rows = reader.start(3)
    rows = reader.read(rows, [EncodedMessages(prompt[:-1], []) for prompt in prompts], write=True)
    found = reader.generate(rows, [prompt[-1] for prompt in prompts], limits, write=True)
    inserted = []
    for prompt, limit, answer in zip(prompts, limits, found, strict=True):
        expected: list[int] = []
        while len(expected) < limit:
            logits = memgen.answer_logits([prompt], [[*expected, 0]])
            expected.append(int(logits[-1].argmax()))
        assert answer == expected
        inserted.append(len(memgen.places(answer)))
    assert max(inserted) == INSERTIONS
    first = reader.generate(rows.select([2, 0]), [prompts[2][-1], prompts[0][-1]], [4, 4], write=True)
    assert first == [found[2][:4], found[0][:4]]
    assert rows.cache_bytes == sum(rows.select([row]).cache_bytes for row in range(3)) > 0
    ended = reader_of(memgen, [found[0][2]], 0).generate(rows.select([0]), [prompts[0][-1]], [9], write=True)
    assert ended == [found[0][: found[0].index(found[0][2])]]


@torch.no_grad()
def test_an_answers_likelihood_is_the_same_among_others(memgen):
    prompts, answers = [[5, 6, 8], [9]], [[4, END, 5], [6, 8]]
    reader = reader_of(memgen, [0], 0)
    rows = reader.read(reader.start(2), [EncodedMessages(prompt[:-1], []) for prompt in prompts], write=True)
    together = reader.answer_nll(rows, [8, 9], answers, write=True)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = F.cross_entropy(memgen.answer_logits([prompt], [answer]), torch.tensor(answer)).item()
        assert together[row] == pytest.approx(alone, rel=1e-5)


def test_no_weaver_is_no_strategy(tiny_model, tmp_path):
    with pytest.raises(StageError, match="no weaver of MemGen"):
        load_memgen(tiny_model("qwen3"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"format": "deltamem"}')
    with pytest.raises(StageError, match="its format isn't memgen"):
        load_memgen(tiny_model("qwen3"), tmp_path)


@pytest.mark.slow
def test_it_is_trained_and_evaluated_like_the_others(tmp_path, tiny_backbone):
    how = {"max_steps": 2, "batch_size": 2, "num_workers": 1, "use_gpu": False, "precision": "float32"}
    strategies = {"memgen": settings().model_dump(exclude={"train"}) | {"train": {"learning_rate": 0.01}}}
    register = {"champion_metric": "qasper/full/f1", "live": False}
    config = prepare_run(tmp_path, tiny_backbone, 2, strategies=strategies, train=how, register=register)
    folder = train_cell(config, "tiny-random", "memgen", 42)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["prompt.vectors"].shape == (PROMPT_LATENTS, 64) and tensors["ends"].numel() == 3
    result = evaluate(config, "tiny-random", "memgen", 42, "qasper")
    assert list(result["conditions"]) == ["none", "full"]
    assert result["conditions"]["full"]["nll"]["value"] > 0 and not result["effects"]
    assert not Layout(config).train_state("tiny-random", "memgen", 42).exists()
    assert register_cell(config, "tiny-random", "memgen", 42)["score"] == result["conditions"]["full"]["f1"]["value"]
