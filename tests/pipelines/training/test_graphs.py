"""Passes over a few shapes that are run again and again give what the plain passes give."""

from itertools import cycle, islice

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.config import Train
from pipelines.training.batches import Read, collate
from pipelines.training.beside import Companions
from pipelines.training.graphs import StepGraphs
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import Schedule
from tests.pipelines.training.episodes import episodes

PAPERS = [2, 1, 3, 1, 2, 1, 1, 4, 1, 1, 2, 2]


def batches(steps):
    """Batches of a schedule with every further loss; their lengths, questions and later texts differ.

    One text is of no tokens. In some batches there are replies whose distributions are kept.
    """
    table = episodes(
        PAPERS,
        width=lambda paper: 0 if paper == 4 else 4 + 5 * (paper % 7),
        source=lambda paper: "own" if paper in (2, 4) else "told",
    )
    values = {
        "batch_size": 12, "micro_batch_size": 6, "questions_per_write": 2, "num_workers": 1, "max_steps": 9,
        "epochs": 99,
        "carry_memory": {"texts": 4, "anew_every": 10},
        "contrast": {"until": 0.6}, "repeat_text": {"texts": 2}, "write_after": {"texts": [0, 1], "shares": [1.0, 1.0]},
    }  # fmt: skip
    train = Train.model_validate(values)
    companions = Companions.of(table, train, 0)
    schedule, written = Schedule(table, train, 0, 1, companions=companions, carries=True), table["context_ids"]
    found = []
    for step in range(steps):
        for micro in schedule.micro_batches(step, 0):
            reads = [Read([7], written[micro.groups[n][0]].as_py(), n) for n in micro.beside.repeated or []]
            found.append(collate(table, micro.groups, 0, micro.beside, reads, {"own"}))
    return found


def make(tiny_model, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    base = tiny_model("llama", "sdpa").to(device, dtype)
    model = get_delta_mem_model(base, DeltaMemConfig(strategy="msw"))
    return MemoryObjective(model, 0.01, 0.05, repeat_weight=0.5, keep_weight=4.0, lanes=12)


def trained(objective, steps, device="cpu"):
    """Losses of some steps of one batch, and the weights at the end."""
    optimizer, losses = torch.optim.SGD(objective.parameters(), 0.1), []
    for batch in islice(cycle(batches(9)), steps):
        result = objective(batch.to(torch.device(device)))
        (2 * result.loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append([x.detach().item() for x in (result.loss, result.answer_nll, result.kl, result.state_norm)])
        assert len(result.token_nll) == len(batch.answer_ids)
    return losses, [parameter.detach().cpu().clone() for parameter in objective.parameters()]


def test_some_batches_have_replies_to_keep_and_some_have_none():
    assert {batch.kept is None for batch in batches(9)} == {True, False}


@pytest.mark.parametrize("planned", [False, True])
def test_padded_passes_with_gradients_handed_on_train_as_plain_ones(tiny_model, planned):
    plain, padded = make(tiny_model), make(tiny_model)
    captures = []

    def run_again(function):
        captures.append(function)
        return function

    padded.graphs = StepGraphs(padded, run_again)
    if planned:
        padded.graphs.prepare(batches(9), 10**6)
        prepared = len(captures)
        assert prepared == padded.graphs.count > 5
    expected, found = trained(plain, 27), trained(padded, 27)
    if planned:
        assert len(captures) == prepared
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert padded.graphs.count <= len(captures) < 27  # shapes come back
    with torch.no_grad():
        before = len(captures)
        padded(batches(1)[0])
    assert len(captures) == before  # what isn't learnt from isn't captured


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("compiled", [False, True, "layers"])
def test_graphs_train_as_plain_passes(tiny_model, compiled, planned):
    from deltamem.backbone.compiled_layers import compile_backbone

    plain, graphed = make(tiny_model, "cuda"), make(tiny_model, "cuda")
    compile_backbone(graphed.model[0].base_model, compiled)
    graphed.graphs = StepGraphs(graphed)
    if planned:
        graphed.graphs.prepare([batch.to(torch.device("cuda")) for batch in batches(9)], 10**6)
    expected, found = trained(plain, 27, "cuda"), trained(graphed, 27, "cuda")
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), atol=5e-3, rtol=1e-3)
    assert 0 < graphed.graphs.count < 27
