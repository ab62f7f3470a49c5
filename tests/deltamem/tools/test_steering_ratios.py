"""How much is added to a projection, measured against what the weights say."""

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from deltamem.backbone.decoder import find_decoder
from deltamem.tools.steering_ratios import steering_ratios

IDS = torch.tensor([[5, 9, 20, 33, 7, 8, 41, 3]])


def adapted(tiny_model, family, strategy="tsw"):
    torch.manual_seed(1)
    config = DeltaMemConfig(
        strategy=strategy, steer=("q", "v", "o"), output_init="random", online_gain=0.5, layers=(0, 2)
    )
    return get_delta_mem_model(tiny_model(family), config).requires_grad_(False).eval()


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
@torch.no_grad()
def test_ratios_are_what_the_equations_say(tiny_model, family):
    model = adapted(tiny_model, family)
    memory = model.write(IDS)
    ratios = steering_ratios(model, IDS, memory=memory)
    assert list(ratios) == [0, 2] and all(list(heads) == ["q", "v", "o"] for heads in ratios.values())
    decoder = find_decoder(model.base_model)  # layer 0 reads what the bare backbone's layer 0 reads
    x = decoder.layers[0].input_norm(model.base_model.get_input_embeddings()(IDS))
    layer = model.memory_layers["0"]
    reads, _, _ = layer(layer.project(x), memory.states[0], None, None, True)
    for head in ("q", "v"):
        projection = decoder.layers[0].projections[head]
        own = projection.module(x)[..., projection.start : projection.stop]
        added = layer.scale * reads @ layer.steer[head].T
        assert ratios[0][head] == pytest.approx(float(added.norm() / own.norm()), rel=1e-4)


@pytest.mark.parametrize("strategy", ["tsw", "msw", "ssw"])
def test_padding_counts_for_nothing_and_the_model_is_as_before(tiny_model, strategy):
    model, segments = adapted(tiny_model, "qwen3", strategy), torch.zeros_like(IDS)
    before = model(IDS, segment_ids=segments).logits
    alone = steering_ratios(model, IDS, segment_ids=segments)
    padded = torch.cat([torch.full((1, 3), 50), IDS], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    ratios = steering_ratios(model, padded, mask, segment_ids=torch.zeros_like(padded))
    for layer, heads in alone.items():
        for head, ratio in heads.items():
            assert ratio > 1e-3 and ratios[layer][head] == pytest.approx(ratio, rel=1e-3)
    assert torch.equal(model(IDS, segment_ids=segments).logits, before)
    model.strength = 0
    silent = steering_ratios(model, IDS, segment_ids=segments)
    assert all(ratio == 0 for heads in silent.values() for ratio in heads.values())
