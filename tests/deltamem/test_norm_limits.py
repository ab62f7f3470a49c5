"""Limits on the norms of states: what they bound, what they leave alone, and that files have them."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deltamem import DeltaMemConfig, DeltaMemModel, DeltaMemory, get_delta_mem_model
from deltamem.adapters.average import average_adapters
from deltamem.adapters.files import load_adapter, save_adapter
from deltamem.adapters.names import without_limits
from deltamem.cli import app
from deltamem.errors import AdapterFormatError, ConfigError
from deltamem.layer import DeltaMemLayer
from deltamem.segments import rank_segments
from deltamem_kernels.gates import gate_projections
from deltamem_kernels.limits import LIMIT_EVERY, limited
from deltamem_kernels.naive import naive_delta_scan

RANK, HIDDEN = 3, 8


def make_layer(strategy="msw", states=2, limit=0.5, dtype=torch.float32):
    torch.manual_seed(0)
    config = DeltaMemConfig(strategy=strategy, rank=RANK, num_states=states, steer=("q",), limit_norms=True)
    layer = DeltaMemLayer(config, HIDDEN, {"q": torch.randn(HIDDEN, RANK)}).to(dtype)
    with torch.no_grad():
        layer.in_proj.normal_(0, 1)
        layer.norm_limit.copy_(torch.linspace(limit, 2 * limit, states))
    return layer


def unlimited(layer):
    """The same weights without limits."""
    other = make_layer(states=layer.num_states, dtype=layer.in_proj.dtype)
    other.load_state_dict(layer.state_dict())
    other.norm_limit = None
    return other


def norms(state):
    return state.flatten(2).norm(dim=-1)


def by_definition(layer, projected, state, valid=None):
    """Token by token, brought back within the limits before the first and every 256th."""
    bring_back = lambda s: s * (layer.norm_limit / norms(s)).clamp_max(1)[..., None, None]  # noqa: E731
    parts = gate_projections(projected, layer.beta_bias, layer.num_states, layer.rank)
    reads = []
    for t in range(projected.shape[1]):
        state = bring_back(state) if t % 256 == 0 else state
        mask = None if valid is None else valid[:, t : t + 1]
        read, state = naive_delta_scan(*(part[:, t : t + 1] for part in parts), state, mask)
        reads.append(read)
    return torch.cat(reads, 1).flatten(2), state


@settings(deadline=None, max_examples=50)
@given(scale=st.floats(0, 100), limit=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
def test_a_state_beyond_its_limit_keeps_its_direction_and_others_their_bits(scale, limit, seed):
    state = scale * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    found = limited(state, torch.full((3,), limit))
    beyond = norms(state) > limit
    assert torch.equal(found[~beyond], state[~beyond])
    torch.testing.assert_close(norms(found)[beyond], torch.full_like(norms(state)[beyond], limit))
    torch.testing.assert_close(found[beyond] * norms(state)[beyond][:, None, None] / limit, state[beyond])
    assert limited(state, None) is state


@pytest.mark.parametrize("length", [1, 3, LIMIT_EVERY, LIMIT_EVERY + 1, 3 * LIMIT_EVERY + 5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_pass_is_what_its_definition_says(length, padded):
    layer = make_layer(dtype=torch.float64)
    projected, state = torch.randn(2, length, 4 * 2 * RANK).double(), 3 * torch.randn(2, 2, RANK, RANK).double()
    valid = torch.arange(length) < torch.tensor([[length], [length // 2]]) if padded else None
    reads, after, written = layer(projected, state, valid, None, True)
    torch.testing.assert_close((reads, after), by_definition(layer, projected, state, valid))
    assert written.gates.shape == (2, length, 2 * RANK)
    assert not torch.allclose(reads, unlimited(layer)(projected, state, valid, None, True)[0], rtol=1e-3)


def test_limits_out_of_reach_change_nothing():
    layer = make_layer(limit=1e6)
    projected, state = torch.randn(2, 2 * LIMIT_EVERY + 9, 4 * 2 * RANK), torch.randn(2, 2, RANK, RANK)
    torch.testing.assert_close(
        layer(projected, state, None, None, True)[:2], unlimited(layer)(projected, state, None, None, True)[:2]
    )


def test_reading_sees_the_limited_state_and_returns_the_memory_as_it_came():
    layer = make_layer()
    projected, state = torch.randn(2, 5, 4 * 2 * RANK), 9 * torch.randn(2, 2, RANK, RANK)
    reads, after, _ = layer(projected, state, None, None, False)
    assert after is state
    expected = unlimited(layer)(projected, limited(state, layer.norm_limit), None, None, False)[0]
    torch.testing.assert_close(reads, expected)


def test_segments_are_written_within_the_limits():
    layer = make_layer("ssw", states=1)
    ids = torch.arange(12).div(3, rounding_mode="floor").expand(2, 12)
    projected, state = torch.randn(2, 12, 4 * RANK), 9 * torch.randn(2, 1, RANK, RANK)
    cut = rank_segments(ids, None, ids.device)
    reads, after, _ = layer(projected, state, None, cut, True)
    expected = unlimited(layer)(projected, limited(state, layer.norm_limit), None, None, False)[0]
    torch.testing.assert_close(reads, expected)
    from_within = unlimited(layer)(projected, limited(state, layer.norm_limit), None, cut, True)[1]
    torch.testing.assert_close(after, from_within)


def test_gradients_pass_through_limits_that_bind_and_an_empty_state():
    layer = make_layer(dtype=torch.float64, limit=0.2)
    projected = torch.randn(1, 6, 4 * 2 * RANK, dtype=torch.float64, requires_grad=True)
    for state in (torch.randn(1, 2, RANK, RANK).double(), torch.zeros(1, 2, RANK, RANK).double()):
        state.requires_grad_()
        run = lambda p, s: layer(p, s, None, None, True)[:2]  # noqa: E731
        if state.detach().any():
            assert torch.autograd.gradcheck(run, (projected, state))
        else:  # where a norm has no derivative
            assert all(g.isfinite().all() for g in torch.autograd.grad(run(projected, state)[1].sum(), (projected,)))


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy="msw", limit_norms=True))
    with torch.no_grad():
        for layer in model.memory_layers.values():
            layer.in_proj.normal_(0, 0.4)
            layer.norm_limit.uniform_(0.2, 0.4)
    return model.eval()


def test_a_row_of_a_batch_is_limited_as_alone_and_the_next_pass_brings_back_what_was_generated(model):
    ids = torch.randint(3, 101, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        both = model.write(ids, mask)
        for row, length in ((0, 20), (1, 12)):
            alone = model.write(ids[row : row + 1, :length])
            for layer in both.states:
                torch.testing.assert_close(both.states[layer][row : row + 1], alone.states[layer])
        said = model.generate(
            ids[:1], memory=alone, max_new_tokens=8, return_dict_in_generate=True, do_sample=False, pad_token_id=0
        )
        limits = {int(i): layer.norm_limit for i, layer in model.memory_layers.items()}
        beyond = {i: (of_layer > limits[i] * (1 + 1e-6)).any() for i, of_layer in said.memory.norms().items()}
        assert any(beyond.values())
        within = DeltaMemory({i: limited(state, limits[i]) for i, state in said.memory.states.items()})
        after, expected = (model.write(ids[:1], memory=memory) for memory in (said.memory, within))
        for layer, state in after.states.items():
            torch.testing.assert_close(state, expected.states[layer])


def test_files_have_the_limits_and_say_which_is_missing(model, tiny_model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    base = tiny_model("qwen3", "sdpa")
    again = DeltaMemModel.from_pretrained(base, tmp_path / "whole")
    for name, layer in model.memory_layers.items():
        assert torch.equal(again.memory_layers[name].norm_limit, layer.norm_limit)
    again.unload()
    config, tensors = load_adapter(tmp_path / "whole")
    assert config.limit_norms and json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["limit_norms"]
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.1.self_attn.norm_limit")}
    save_adapter(tmp_path / "part", config, without)
    with pytest.raises(AdapterFormatError, match=r"tensor model.layers.1.self_attn.norm_limit is missing"):
        DeltaMemModel.from_pretrained(base, tmp_path / "part")
    save_adapter(tmp_path / "unsaid", replace(config, limit_norms=False), tensors)
    with pytest.raises(AdapterFormatError, match="tensors belong to no layer"):
        DeltaMemModel.from_pretrained(base, tmp_path / "unsaid")
    doubled = {name: 2 * tensor if name.endswith("norm_limit") else tensor for name, tensor in tensors.items()}
    save_adapter(tmp_path / "doubled", config, doubled)
    _, mean = average_adapters([tmp_path / "whole", tmp_path / "doubled"])
    name = "model.layers.0.self_attn.norm_limit"
    torch.testing.assert_close(mean[name], 1.5 * tensors[name])
    command = ["average", tmp_path / "mean", tmp_path / "whole", tmp_path / "doubled", "--bfloat16"]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0
    _, rounded = load_adapter(tmp_path / "mean")
    assert torch.equal(rounded[name], mean[name])
    assert {tensor.dtype for tensor in without_limits(rounded).values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="limit_norms must be true or false"):
        DeltaMemConfig(limit_norms=3)
