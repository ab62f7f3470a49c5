"""Padded to a shape, a batch has the loss and the gradients that it has as it is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.training.batches import Read, collate
from pipelines.training.beside import Beside
from pipelines.training.objective import MemoryObjective
from pipelines.training.padding import CAPTURE, ReadShape, Shape, padded, plan
from tests.pipelines.training.episodes import episodes


def batch():
    """Three texts of unequal length with two questions, one and two, told apart, repeated, another written after.

    The answers about two of them are the frozen model's own.
    """
    table = episodes([2, 1, 3], width=lambda paper: 6 + 3 * paper, source="abc".__getitem__)
    beside = Beside(after=[[2, 0, 0]], others=[2, 0, 1], contrast=0.5, repeated=[1], repeat_weight=1.0)
    return collate(table, [[0, 1], [2], [3, 4]], 0, beside, [Read([7, 7], [3, 4, 5, 6], 1)], {"a", "c"})


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
@pytest.mark.parametrize("writes", [False, True])
def test_nothing_that_is_measured_or_learnt_changes(tiny_model, strategy, writes):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("llama", "sdpa"), DeltaMemConfig(strategy=strategy, alpha=160))
    objective = MemoryObjective(model, 0.01, 0.05, writes, repeat_weight=0.3, keep_weight=0.4)
    plain, parameters = batch(), list(objective.parameters())
    wide = padded(plain, replace(Shape.of(plain).rounded(), texts=5, questions=ReadShape(8, 16, 24)))
    assert wide.context_ids.shape == (5, 16) and wide.input_ids.shape == (8, 16) and len(wide.answer_ids) == 24
    expected, found = objective(plain), objective(wide)
    for name in ("loss", "answer_nll", "contrast", "repeat_nll", "kl", "write_gate", "state_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    answers = len(plain.answer_ids)
    torch.testing.assert_close(found.token_nll[:answers], expected.token_nll, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_where_nothing_is_written_padding_writes_nothing(tiny_model, strategy):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("llama", "sdpa"), DeltaMemConfig(strategy=strategy, alpha=160))
    objective = MemoryObjective(model, 0.01, 0.05, write_questions=True)
    plain, parameters = collate(episodes([1, 2], width=lambda paper: 0), [[0], [1, 2]], 0), list(objective.parameters())
    wide = padded(plain, Shape.of(plain).rounded())
    assert plain.context_ids.shape == (2, 1) and wide.context_ids.shape == (2, 16)
    expected, found = objective(plain), objective(wide)
    torch.testing.assert_close(found[:4], expected[:4], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_batches_of_a_kind_come_to_one_shape():
    one = Shape.of(batch())
    other = replace(one, questions=ReadShape(9, 30, 7), repeat=ReadShape(1, 40, 9))
    assert one.rounded().kind == other.rounded().kind
    both = one.rounded().joined(other.rounded())
    for shape in (one, other):
        sizes = zip((both.questions, both.repeat), (shape.questions, shape.repeat), strict=True)
        assert all(
            a >= b for large, small in sizes for a, b in zip(vars(large).values(), vars(small).values(), strict=True)
        )
    others = replace(one, later=2), replace(one, contrast=False), replace(one, kept=False)
    assert all(other.kind != one.kind for other in others)


@given(st.integers(1, 5000))
def test_a_rounded_shape_holds_what_it_is_made_of_and_little_more(size):
    shape = replace(Shape.of(batch()), texts=size, width=size, questions=ReadShape(size, size, size))
    rounded = shape.rounded()
    assert size <= rounded.width <= max(16, 1.5 * size)
    for found in (rounded.texts, rounded.questions.prompts):
        assert size <= found <= 1.125 * size + 1
    assert len({replace(shape, width=w).rounded().width for w in range(16, 257)}) == 9


sizes = st.integers(1, 400)
shapes = st.builds(
    Shape,
    texts=st.integers(1, 80), width=sizes, later=st.integers(0, 2), contrast=st.booleans(), kept=st.booleans(),
    questions=st.builds(ReadShape, st.integers(1, 140), sizes, sizes),
    repeat=st.none() | st.builds(ReadShape, st.integers(1, 20), sizes, sizes),
)  # fmt: skip


@given(st.lists(shapes, min_size=1, max_size=25), st.integers(25, 20_000))
def test_a_plan_holds_every_shape_that_it_was_made_of(sample, steps):
    planned = plan(sample, steps)
    assert len(set(planned)) == len(planned) <= len(sample)
    assert [shape.tokens for shape in planned] == sorted(shape.tokens for shape in planned)
    for shape in sample:
        assert any(one.holds(shape) for one in planned)
    assert {one.fixed for one in planned} == {shape.fixed for shape in sample}


@given(st.lists(shapes, min_size=2, max_size=25), st.integers(25, 20_000))
def test_a_plan_takes_no_longer_than_a_graph_for_each_shape(sample, steps):
    """In padded tokens, with what making the graphs takes."""

    def time(shapes):
        padded_to = [min(one.tokens for one in shapes if one.holds(shape.rounded())) for shape in sample]
        return CAPTURE * len(shapes) + sum(padded_to) * steps / len(sample)

    assert time(plan(sample, steps)) <= time({shape.rounded() for shape in sample}) * (1 + 1e-9)


def test_a_long_training_gets_more_shapes_than_a_short_one():
    one = replace(Shape.of(batch()), texts=64)
    sample = [replace(one, width=width) for width in range(16, 400)]
    assert [len(plan(sample, steps)) for steps in (1, 100, 10**6)] == [1, 3, 12]


def test_what_a_batch_holds_beside_its_questions_is_not_padded():
    one = Shape.of(batch())
    assert one.holds(one) and one.rounded().holds(one)
    others = {"later": 2}, {"contrast": False}, {"kept": False}, {"repeat": None}
    for other in (replace(one, **change) for change in others):
        assert not one.rounded().holds(other)
    assert not one.holds(replace(one, width=one.width + 1))
    assert not one.holds(replace(one, texts=one.texts + 1))
    assert not one.holds(replace(one, questions=ReadShape(6, 99, 4)))
