"""The mean of adapters: what it is, that order doesn't matter, and what can't be averaged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamem import DeltaMemConfig, DeltaMemModel, get_delta_mem_model
from deltamem.adapters.average import average_adapters
from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.errors import AdapterFormatError


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Saves an adapter of random weights, and returns its folder."""

    def save(name, seed, **config):
        torch.manual_seed(seed)
        model = get_delta_mem_model(tiny_model("qwen3"), DeltaMemConfig(**config))
        for parameter in model.memory_layers.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_it_is_the_mean_of_every_weight_in_any_order_and_can_be_used(saved, tiny_model, tmp_path):
    folders = [saved(str(seed), seed) for seed in range(3)]
    config, mean = average_adapters(folders)
    every = [load_adapter(folder)[1] for folder in folders]
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([one[name] for one in every]).mean(0))
        torch.testing.assert_close(tensor, average_adapters(folders[::-1])[1][name])
    save_adapter(tmp_path / "mean", config, mean)
    model = DeltaMemModel.from_pretrained(tiny_model("qwen3"), tmp_path / "mean")
    assert torch.isfinite(model(torch.tensor([[5, 9, 20]])).logits).all()


@given(st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=6))
def test_equal_weights_stay_and_bfloat16_is_averaged_in_float32(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("adapters")
    tensors = [{"w": torch.full((3,), value, dtype=torch.bfloat16)} for value in values]
    for number, one in enumerate(tensors):
        save_adapter(folder / str(number), DeltaMemConfig(), one)
    (mean,) = average_adapters([folder / str(number) for number in range(len(values))])[1].values()
    expected = torch.stack([one["w"].float() for one in tensors]).mean(0)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-4)


def test_only_adapters_that_differ_in_nothing_but_weights(saved):
    one, other = saved("one", 0), saved("other", 1, rank=4)
    with pytest.raises(AdapterFormatError, match="rank 8 and 4"):
        average_adapters([one, other])
    with pytest.raises(AdapterFormatError, match="two adapters or more; given: .*one"):
        average_adapters([one])
    config, tensors = load_adapter(one)
    tensors.popitem()
    save_adapter(other.parent / "cut", config, tensors)
    with pytest.raises(AdapterFormatError, match="cut has no .* is its file damaged"):
        average_adapters([one, other.parent / "cut"])
