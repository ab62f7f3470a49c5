"""MLP Memory: its targets against brute force, its loss against the definition, its mixture at every place."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from deltamem.backbone.decoder import find_decoder
from pipelines.config.strategies import MlpMemoryStrategy
from pipelines.errors import StageError
from pipelines.evaluate import evaluate
from pipelines.strategies.mlp_memory import MlpMemory, mix_into
from pipelines.strategies.mlp_memory_recipe import MlpMemoryObjective, load_mlp_memory
from pipelines.strategies.neighbours import Neighbours
from pipelines.train import train_cell
from pipelines.training.batches import collate
from tests.pipelines.generated_run import prepare_run
from tests.pipelines.training.episodes import episodes

VOCABULARY = 30


def settings(**changes):
    return MlpMemoryStrategy(**{"kind": "mlp_memory", "neighbours": 6, "temperature": 4.0, **changes})


@pytest.fixture
def texts():
    """Three texts; the second begins as the first does, so that two pairs of keys lie on each other."""
    draw = np.random.default_rng(0)
    states = [draw.normal(size=(length, 8)).astype(np.float32) for length in (9, 7, 12)]
    states[1][:2] = states[0][:2]
    ids = [draw.integers(0, VOCABULARY, len(found)) for found in states]
    ids[1][:3] = ids[0][:3]
    return list(zip(("a", "b", "c"), states, ids, strict=True))


def by_brute_force(texts, count, temperature):
    """[N, V] the distribution over next tokens of the ``count`` nearest other keys."""
    keys = torch.cat([torch.from_numpy(states[:-1]) for _, states, _ in texts]).double()
    following = torch.cat([torch.from_numpy(ids[1:]) for _, _, ids in texts])
    distances = (keys[:, None] - keys[None]).square().sum(-1)
    distances.fill_diagonal_(math.inf)
    nearest = distances.topk(count, largest=False)
    weights = (-nearest.values / temperature).softmax(1)
    return torch.zeros(len(keys), VOCABULARY, dtype=torch.double).scatter_add_(1, following[nearest.indices], weights)


@pytest.mark.parametrize(("index", "device"), [("Flat", None), ("Flat", torch.device("cpu")), ("IVF2,Flat", None)])
@pytest.mark.parametrize("count", [1, 6, 25])
def test_the_neighbours_distribution_is_that_of_brute_force(texts, index, device, count):
    found = Neighbours.of(texts, settings(neighbours=count, index=index, probes=2), device)  # all lists are searched
    expected = by_brute_force(texts, min(count, 24), 4.0)
    made = torch.zeros_like(expected).scatter_add_(1, found.tokens.long(), found.weights.double())
    assert torch.allclose(made, expected, atol=2e-3)  # float16
    assert found.first == {"a": 0, "b": 8, "c": 14}
    entropy = -torch.special.xlogy(expected, expected).sum(1)
    assert torch.allclose(found.entropy.double(), entropy, atol=1e-4)


def test_the_divergence_is_that_of_the_whole_distributions(texts):
    found, expected = Neighbours.of(texts, settings()), by_brute_force(texts, 6, 4.0)
    logarithms = torch.randn(25, VOCABULARY).log_softmax(1)
    keys = torch.tensor([3, 20, 0])
    kl = F.kl_div(logarithms[keys], expected[keys].float(), reduction="none").sum(1)
    assert torch.allclose(found.divergence(keys, logarithms[keys]), kl, atol=3e-3)
    assert (found.divergence(keys, expected[keys].float().clamp_min(1e-9).log()).abs() < 5e-3).all()


def test_an_index_that_cannot_be_made_is_named(texts):
    with pytest.raises(StageError, match="the index 'IVF4096,Flat' of mlp_memory can't be made of 25 tokens"):
        Neighbours.of(texts, settings(index="IVF4096,Flat"))
    with pytest.raises(StageError, match="more than two tokens"):
        Neighbours.of([("a", np.zeros((2, 8), np.float32), np.zeros(2, np.int64))], settings())


def last_input(base, ids):
    """What the last feed-forward network reads, from transformers' own hidden states."""
    layer, seen = find_decoder(base).layers[-1].module, []
    hook = layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(out))
    base(ids)
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_the_loss_is_half_divergence_half_next_token_over_the_texts_alone(tiny_model):
    base = tiny_model("qwen3")
    network = MlpMemory(base.config, depth=2)
    batch = collate(episodes([1, 1], width=lambda paper: 4 + paper), [[0], [1]], 0)
    rows = [[3, 4, 5, 6], [3, 4, 5, 6, 7]]
    states = [base.model(torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]
    named = [(f"p{number}", states[number], np.array(row)) for number, row in enumerate(rows)]
    neighbours = Neighbours.of(named, settings(neighbours=3))
    result = MlpMemoryObjective(base, network, neighbours, kl_weight=0.5)(batch)

    logits = torch.cat([network(last_input(base, torch.tensor([row]))[0, :-1]) for row in rows])
    following = torch.tensor([token for row in rows for token in row[1:]])
    nll = F.cross_entropy(logits, following)
    target = torch.zeros_like(logits).scatter_add_(1, neighbours.tokens.long(), neighbours.weights.float())
    kl = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
    assert result.nll.item() == pytest.approx(nll.item(), rel=1e-5)
    assert result.kl.item() == pytest.approx(kl.item(), abs=2e-3)
    assert result.loss.item() == pytest.approx(0.5 * (kl + nll).item(), abs=2e-3)
    assert len(result.token_nll) == 3 + 4  # no token of question or answer, none of the padding
    validated = MlpMemoryObjective(base, network, None, 0.5).validate([batch])["nll"]
    assert validated.tolist() == pytest.approx([nll.item()], rel=1e-5)


@torch.no_grad()
def test_the_mixture_is_of_probabilities_at_every_place(tiny_model):
    base = tiny_model("qwen3")
    torch.manual_seed(1)
    network, ids = MlpMemory(base.config, depth=1), torch.tensor([[5, 9, 3, 7]])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    own, said = base(ids).logits.softmax(-1), network(last_input(base, ids)).softmax(-1)
    expected = (0.7 * own + 0.3 * said).log()
    mixed = mix_into(base, network, 0.3)
    assert torch.allclose(mixed(ids).logits, expected, atol=1e-5)
    assert torch.allclose(mixed(ids, logits_to_keep=1).logits, expected[:, -1:], atol=1e-5)
    first = mixed(ids[:, :3], use_cache=True)
    assert torch.allclose(mixed(ids[:, 3:], past_key_values=first.past_key_values).logits, expected[:, 3:], atol=1e-5)
    assert mixed.generate(ids, max_new_tokens=1, do_sample=False)[0, -1] == expected[0, -1].argmax()


def test_it_is_as_deep_and_as_wide_as_the_backbone(tiny_model):
    config = tiny_model("qwen3").config
    network = MlpMemory(config, None)
    assert len(network.blocks) == config.num_hidden_layers
    assert network.blocks[0].up.weight.shape == (config.intermediate_size, config.hidden_size)
    assert network.head.weight.shape == (config.vocab_size, config.hidden_size)


def test_no_network_is_no_strategy(tiny_model, tmp_path):
    with pytest.raises(StageError, match="no network of MLP Memory"):
        load_mlp_memory(tiny_model("qwen3"), tmp_path)


@pytest.mark.slow
def test_it_is_trained_and_evaluated_like_the_others(tmp_path, tiny_backbone):
    how = {"batch_size": 2, "micro_batch_size": 2, "num_workers": 1, "use_gpu": False, "precision": "float32"}
    changes = {"epochs": 2, "learning_rate": 0.01}
    strategies = {"mlp": {"kind": "mlp_memory", "neighbours": 8, "train": changes}}
    generated = {"train_papers": 2, "eval_papers": 2, "facts_per_paper": 2}
    config = prepare_run(
        tmp_path, tiny_backbone, 2, strategies=strategies, train=how,
        data={"source": "generated", "generated": generated, "processes": 1},
        register={"champion_metric": "qasper/full/f1", "live": False},
    )  # fmt: skip
    folder = train_cell(config, "tiny-random", "mlp", 42)
    assert "head.weight" in load_file(folder / "adapter_model.safetensors")
    first, second = csv.DictReader((folder / "curve.csv").read_text().splitlines())  # two texts make a step an epoch
    assert all(float(row[name]) > 0 for row in (first, second) for name in ("loss", "kl", "text_nll"))
    mixed, frozen = (evaluate(config, "tiny-random", *cell, "qasper") for cell in (("mlp", 42), ("frozen", 0)))
    assert list(mixed["conditions"]) == ["none", "full"]
    assert mixed["conditions"]["full"]["nll"]["value"] != frozen["conditions"]["full"]["nll"]["value"]
