"""What training measures of the memory besides its loss."""

import pytest
import torch

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.training.batches import collate
from pipelines.training.losses import answer_nll, divergence, nll_by_source
from pipelines.training.objective import MemoryObjective
from tests.pipelines.training.episodes import episodes


@pytest.fixture(scope="module")
def table():
    """Three papers of different texts, of two questions, one and three."""
    return episodes([2, 1, 3], width=lambda paper: 6 + 3 * paper)


@pytest.fixture(params=["tsw", "ssw", "msw"])
def objective(tiny_model, request):
    torch.manual_seed(0)
    model = get_delta_mem_model(
        tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy=request.param, alpha=1600)
    )  # an effect to see
    return MemoryObjective(model, 0.01, 0.05)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_where_nothing_is_written_a_fresh_memory_is_read_alone_as_in_a_batch(tiny_model, strategy, writes):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy=strategy, alpha=160))
    objective = MemoryObjective(model, 0.0, 0.05, writes)
    data, parameters = episodes([1, 1, 2], width=lambda paper: (0, 9, 0)[paper]), list(objective.parameters())

    def learnt(loss):
        return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    alone = [learnt(objective(collate(data, [[row]], 0)).loss) for row in range(4)]
    for row in (0, 2, 3):
        batch = collate(data, [[row]], 0)
        logits = model(batch.input_ids, memory=model.new_memory(1), write=objective.write_questions).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[batch.answer_columns], batch.answer_ids)
        torch.testing.assert_close(alone[row], learnt(nll), atol=1e-6, rtol=1e-4)
        taught = any(gradient.abs().max() > 1e-4 for gradient in alone[row][1:])
        assert taught == (objective.write_questions and batch.input_ids.shape[1] > 2)  # what is written is read later
    for groups in ([[0], [1], [2, 3]], [[0], [2, 3]]):
        rows = [row for group in groups for row in group]
        expected = [sum(alone[row][part] for row in rows) / len(rows) for part in range(len(alone[0]))]
        torch.testing.assert_close(learnt(objective(collate(data, groups, 0)).loss), expected, atol=1e-6, rtol=1e-4)


def test_what_is_measured_of_the_writing_is_of_the_texts_that_have_a_token(objective):
    data = episodes([1, 1, 1], width=lambda paper: (0, 9, 0)[paper])
    with torch.no_grad():
        nothing, text, both = (objective(collate(data, rows, 0)) for rows in ([[0], [2]], [[1]], [[0], [1], [2]]))
    assert nothing.loss == nothing.answer_nll and (nothing.write_gate, nothing.state_norm) == (0, 0)
    for part in ("write_gate", "state_norm"):
        torch.testing.assert_close(getattr(both, part), getattr(text, part), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both.loss - both.answer_nll, text.loss - text.answer_nll, atol=1e-6, rtol=1e-4)


def test_norms_are_summed_over_the_texts_that_have_a_token(objective):
    data = episodes([1, 1, 1, 1], width=lambda paper: (0, 9, 0, 12)[paper])
    norms, texts = objective.sum_of_norms(collate(data, rows, 0) for rows in ([[0], [1]], [[2]], [[3], [1]]))
    with torch.no_grad():
        alone = [objective._write(collate(data, [[row]], 0))[1].norms().values() for row in (1, 3, 1)]
    expected = sum(torch.stack([of_layer[0] for of_layer in of_text]) for of_text in alone)
    torch.testing.assert_close(norms, expected, atol=1e-6, rtol=1e-5)
    assert texts == 3 and (norms > 0).all()


def test_an_answer_counts_as_the_weighted_mean_of_its_tokens(objective):
    def asked(weights):
        return objective(collate(episodes([2, 2], weights=weights), [[0, 1], [2, 3]], 0))

    even, weighed = asked(None), asked([1.0, 3.0])
    assert torch.equal(even.token_nll, weighed.token_nll)
    nll = weighed.token_nll  # of answers of one token, two, one, two
    expected = torch.stack([nll[0], (nll[1] + 3 * nll[2]) / 4, nll[3], (nll[4] + 3 * nll[5]) / 4]).mean()
    torch.testing.assert_close(weighed.answer_nll, expected)
    torch.testing.assert_close(weighed.loss - weighed.answer_nll, even.loss - even.answer_nll)


def keeping(tiny_model, **options):
    """An objective that keeps the frozen model's own replies, and steers enough to change them."""
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy="msw", alpha=1600))
    return MemoryObjective(model, 0.0, 0.05, keep_weight=0.4, **options)


def gradients(objective, loss):
    return torch.autograd.grad(loss, list(objective.parameters()), allow_unused=True, materialize_grads=True)


REPLIES = {"own"}


def replies(width=lambda paper: 6 + 3 * paper):
    """Three documents with two questions each; the answers about the first and the last are the frozen model's own."""
    return episodes([2, 2, 2], width=width, source=lambda paper: "told" if paper == 1 else "own")


def test_divergence_is_kl_from_the_frozen_distribution():
    frozen, adapted = (
        torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]),
        torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0]]),
    )
    expected = torch.tensor([0.25, 1.0]) * torch.tensor(2.0).log()
    torch.testing.assert_close(divergence((frozen + 1e-12).log(), (adapted + 1e-12).log()), expected)


def test_an_empty_memory_that_is_not_written_has_lost_nothing(tiny_model):
    objective = keeping(tiny_model)
    result = objective(collate(replies(width=lambda paper: 0), [[0, 1], [2], [5]], 0, keep=REPLIES))
    torch.testing.assert_close(result.kl, torch.tensor(0.0), atol=1e-6, rtol=0)
    told = objective(collate(replies(), [[2, 3]], 0, keep=REPLIES))
    assert told.kl == 0 and torch.equal(told.loss, told.answer_nll)


@pytest.mark.parametrize("writes", [False, True])
def test_replies_are_held_to_what_the_frozen_model_would_have_said(tiny_model, writes):
    objective = keeping(tiny_model, write_questions=writes)
    (model,) = objective.model
    rows, kept, losses = range(6), [], []
    for row in rows:
        alone = collate(replies(), [[row]], 0)
        with torch.no_grad(), model.disable_adapter():
            p = model(alone.input_ids).logits[0, alone.answer_columns].softmax(-1)
        logits = model(alone.input_ids, memory=model.write(alone.context_ids), write=writes).logits
        q = logits[0, alone.answer_columns].softmax(-1)
        nll = answer_nll(-q[range(len(q)), alone.answer_ids].log(), alone)
        kept.append((p * (p / q).log()).sum(-1).mean() * (row not in (2, 3)))
        losses.append(nll + 0.4 * kept[-1])
    result = objective(collate(replies(), [[0, 1], [2, 3], [4, 5]], 0, keep=REPLIES))
    assert result.kl > 0.01
    torch.testing.assert_close(result.kl, torch.stack(kept).mean().detach(), atol=1e-5, rtol=1e-4)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(result.loss, expected, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(gradients(objective, result.loss), gradients(objective, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("selective", [False, True])
def test_with_activations_computed_again_replies_are_held_alike(tiny_model, selective):
    objective = keeping(tiny_model)
    batch = collate(replies(), [[0, 1], [2, 3], [4, 5]], 0, keep=REPLIES)
    plain = objective(batch)
    expected = gradients(objective, plain.loss)
    objective.model[0].gradient_checkpointing_enable(selective=selective)
    objective.model[0].train()
    again = objective(batch)
    torch.testing.assert_close((again.loss, again.kl), (plain.loss, plain.kl))
    for ours, theirs in zip(gradients(objective, again.loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_questions_are_written_as_they_are_read(tiny_model, table, strategy):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(strategy=strategy, alpha=1600))
    batch = collate(table, [[3], [4], [5]], 0)  # questions of one, two and three tokens
    read, written = (MemoryObjective(model, 0.0, 0.05, writes)(batch).answer_nll for writes in (False, True))
    nll = []
    for row in (3, 4, 5):
        alone = collate(table, [[row]], 0)
        memory = model.write(alone.context_ids, segment_ids=alone.segment_ids)
        segments = torch.zeros_like(alone.input_ids)
        logits = model(alone.input_ids, memory=memory, write=True, segment_ids=segments).logits[0]
        nll.append(torch.nn.functional.cross_entropy(logits[alone.answer_columns], alone.answer_ids))
    torch.testing.assert_close(written, torch.stack(nll).mean(), atol=1e-5, rtol=1e-4)
    assert ((written - read).abs() > 1e-4) == (strategy != "ssw")


def test_the_penalty_is_of_the_gates_of_the_writing_alone(objective, table):
    (model,) = objective.model
    batch = collate(table, [[0, 1], [2]], 0)
    with torch.no_grad():
        loss = objective(batch)
        gates = [
            model.write_with_gates(row[None, :length], segment_ids=segments[None, :length])[1]
            for row, segments, length in zip(
                batch.context_ids, batch.segment_ids, batch.context_mask.sum(1).tolist(), strict=True
            )
        ]
        weights = batch.context_mask.sum(1).float()
        if model.config.strategy == "ssw":  # a gate a segment
            weights = torch.tensor([float(row[row >= 0].unique().numel()) for row in batch.segment_ids])
    mean = (torch.stack(gates) * weights[:, None]).sum(0) / weights.sum()
    expected = 0.01 * (mean - 0.05).square().mean()
    assert (loss.loss - loss.answer_nll).item() == pytest.approx(expected.item(), rel=1e-3) and expected > 0


def by_definition(objective, table, pairs):
    """Mean over questions of NLL(memory of the second paper) - NLL(memory of the first); one question at a time."""
    (model,) = objective.model
    differences = []
    with torch.no_grad():
        for question, other in pairs:
            batch, wrong = collate(table, [[question]], 0), collate(table, [[other]], 0)
            nll = []
            for source in (batch, wrong):
                memory = model.write(source.context_ids, segment_ids=source.segment_ids)
                logits = model(batch.input_ids, memory=memory, write=False).logits[0, batch.answer_columns]
                nll.append(torch.nn.functional.cross_entropy(logits, batch.answer_ids))
            differences.append(nll[1] - nll[0])
    return torch.stack(differences).mean()


def test_memory_effect_is_its_definition(objective, table):
    # papers in the order of their contexts: 0, 1, 2; each is read with the next one's memory
    pairs = [(0, 2), (1, 2), (2, 3), (3, 0), (4, 0), (5, 0)]
    whole = [(collate(table, [[0, 1], [2], [3, 4, 5]], 0), 1.0)]
    # the same in micro-batches of one context: the weights are the questions' shares
    alone = [([0, 1], 1.0), ([2], 0.5), ([3, 4, 5], 1.5)]
    apart = [(collate(table, [group], 0), weight) for group, weight in alone]
    expected = by_definition(objective, table, pairs)
    assert expected.abs() > 1e-3
    for batches in (whole, apart):
        torch.testing.assert_close(objective.memory_effect(batches), expected, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in objective.parameters())


def test_a_paper_s_own_other_questions_are_no_other_paper(objective, table):
    groups = [[0], [1], [2]]  # the first two contexts are one paper's
    expected = by_definition(objective, table, [(0, 2), (1, 2), (2, 0)])
    torch.testing.assert_close(
        objective.memory_effect([(collate(table, groups, 0), 1.0)]), expected, atol=1e-5, rtol=1e-3
    )


def test_where_nothing_is_written_there_is_no_memory_to_swap(objective, table):
    widths = (6, 0, 9, 12, 0)
    more = episodes([2, 2, 1, 3, 1], width=widths.__getitem__)  # the table's papers, and two of nothing
    expected = objective.memory_effect([(collate(table, [[0, 1], [2], [3, 4, 5]], 0), 1.0)])
    groups = [[0, 1], [2, 3], [4], [5, 6, 7], [8]]
    whole = [(collate(more, groups, 0), 1.0)]
    apart = [(collate(more, [group], 0), len(group) * 5 / 9) for group in groups]
    assert expected.abs() > 1e-3
    for batches in (whole, apart):
        torch.testing.assert_close(objective.memory_effect(batches), expected, atol=1e-5, rtol=1e-3)
    assert objective.validate([collate(more, groups, 0)])["swapped"].item() == pytest.approx(6 / 9)
    assert objective.memory_effect([(collate(more, [[2], [4], [8]], 0), 1.0)]).isnan()


def test_one_paper_alone_has_no_effect_to_measure(objective, table):
    assert objective.memory_effect([(collate(table, [[3], [4]], 0), 1.0)]).isnan()


def test_losses_by_source_are_means_over_their_questions(objective):
    owners = ["a", "b", "a"]
    table = episodes([2, 1, 3], width=lambda paper: 6 + 3 * paper, source=owners.__getitem__)
    whole = collate(table, [[0, 1], [2], [3, 4], [5]], 0)
    result = objective(whole)
    assert not result.token_nll.requires_grad
    sums = nll_by_source(result.token_nll, whole, ["a", "b", "c"])
    assert sums[:, 1].tolist() == [5, 1, 0] and sums[2, 0] == 0
    torch.testing.assert_close(sums[:, 0].sum() / 6, result.answer_nll)
    alone = objective(collate(table, [[2]], 0)).answer_nll
    torch.testing.assert_close(sums[1, 0], alone, atol=1e-5, rtol=1e-4)
    # micro-batches add up to the whole
    parts = [collate(table, groups, 0) for groups in ([[0, 1], [2]], [[3, 4], [5]])]
    added = sum(nll_by_source(objective(part).token_nll, part, ["a", "b", "c"]) for part in parts)
    torch.testing.assert_close(added, sums, atol=1e-5, rtol=1e-4)
