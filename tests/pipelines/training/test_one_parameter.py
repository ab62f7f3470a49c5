"""An objective whose parameters are pieces of a single one computes, learns and shows what it does by itself."""

import copy

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.training.graphs import StepGraphs
from pipelines.training.objective import MemoryObjective
from pipelines.training.one_parameter import OneParameter
from tests.pipelines.training.test_padding import batch


def make(tiny_model, strategy="msw", checkpointing=None):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("llama", "sdpa"), DeltaMemConfig(strategy=strategy, alpha=160))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(selective=checkpointing)
        model.train()
    return MemoryObjective(model, 0.01, 0.05, repeat_weight=0.3, keep_weight=0.4)


def learn(module, parameters, steps=3):
    """Losses of some steps, and of the same batch afterwards."""
    optimizer, losses = torch.optim.SGD(parameters, 0.1), []  # Adam makes much of gradients that are but rounding
    for _ in range(steps):
        result = module(batch())
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(result.loss.item())
    with torch.no_grad():
        return [*losses, module(batch()).loss.item()]


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize(
    ("strategy", "checkpointing"), [("tsw", None), ("ssw", None), ("msw", None), ("msw", False), ("msw", True)]
)
def test_it_learns_the_same(tiny_model, strategy, checkpointing, graphed):
    if graphed and checkpointing is not None:
        pytest.skip("graphs keep their activations")
    apart, whole = make(tiny_model, strategy, checkpointing), make(tiny_model, strategy, checkpointing)
    if graphed:
        whole.graphs = StepGraphs(whole, lambda function: function)
    module = OneParameter(whole)
    assert [name for name, _ in module.named_parameters()] == ["whole"]
    expected, found = learn(apart, apart.parameters()), learn(module, module.parameters())
    assert expected[-1] < expected[0] - 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # what looks at the objective sees what was learnt
        assert whole(batch()).loss.item() == found[-1]
    for ours, theirs in zip(whole.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_kept_are_learnt_with_the_next(tiny_model, dtype, graphed):
    objectives = [make(tiny_model).to(dtype) for _ in range(2)]
    if graphed:
        for objective in objectives:
            objective.graphs = StepGraphs(objective, lambda function: function)
    module, apart = map(OneParameter, objectives)
    gradients = [torch.autograd.grad(apart(batch()).loss * share, [apart.whole])[0] for share in (0.5, 0.2, 0.3)]
    kept = [module.keep(share, batch()).loss for share in (0.5, 0.2)]
    with torch.no_grad():
        module(batch())  # learns nothing, and leaves them
    last = module(batch()).loss
    (last * 0.3).backward()
    assert module.whole.grad.dtype == dtype and all(torch.equal(loss.detach(), last.detach()) for loss in kept)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        module.whole.grad.float(), sum(g.float() for g in gradients), atol=tolerance, rtol=tolerance
    )
    module.whole.grad = None
    module(batch()).loss.backward()  # none is learnt twice
    torch.testing.assert_close(module.whole.grad * 0.3, gradients[2], atol=tolerance, rtol=tolerance)


def test_where_it_was_moved_its_pieces_are_found_again(tiny_model):
    objective = make(tiny_model)
    before = copy.deepcopy(dict(objective.named_parameters()))
    module = OneParameter(objective)
    module.whole.data = module.whole.detach().double().clone()
    module.point()
    module.whole.data.mul_(2)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.detach(), 2 * before[name].detach().double())
    pieces = module.pieces(module.whole.detach())
    assert {name: piece.shape for name, piece in pieces.items()} == {n: p.shape for n, p in before.items()}
    assert torch.equal(module.join(dict(reversed(pieces.items()))), module.whole.detach())
