"""The order of episodes and their tensors: fixed, complete, and the same for any number of workers."""

from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.batches import collate
from pipelines.training.learning_rate import learning_rate
from pipelines.training.schedule import Mixture, Schedule, cut_evenly
from tests.pipelines.training.episodes import episodes


def train(**values):
    return Train.model_validate({"batch_size": 4, "micro_batch_size": 1, "num_workers": 2, **values})


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.sampled_from([(1, 1), (2, 2), (4, 1)]),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_an_epoch_asks_every_question_and_workers_only_share_it_out(counts, shape, per_write, seed):
    workers, micro = shape
    options = train(batch_size=4 * per_write, micro_batch_size=micro * per_write, questions_per_write=per_write)
    table = episodes(counts, width=lambda paper: 3 + paper % 4)
    schedule, alone = Schedule(table, options, seed, workers), Schedule(table, options, seed, 1)
    seen = []
    for step in range(schedule.steps):
        dealt = [schedule.micro_batches(step, rank) for rank in range(workers)]
        assert {len(batches) for batches in dealt} == {schedule.accumulation}
        groups = sorted(group for batches in dealt for batch in batches for group in batch.groups)
        assert groups == sorted(group for batch in alone.micro_batches(step, 0) for group in batch.groups)
        shares = [batch.weight / sum(map(len, batch.groups)) for batches in dealt for batch in batches]
        assert shares == pytest.approx([shares[0]] * len(shares))  # every question counts alike
        assert sum(batch.weight for batches in dealt for batch in batches) == pytest.approx(len(shares))
        seen += [row for group in groups for row in group]
    assert set(seen) == set(range(len(table)))
    assert schedule.micro_batches(0, 0) == Schedule(table, options, seed, workers).micro_batches(0, 0)


def test_the_papers_epoch_has_seventy_steps():
    """2,219 episodes, 8 GPUs × batch 1 × accumulation 4 (paper, Training recipe)."""
    schedule = Schedule(episodes([1] * 2219), Train(), 42, 8)
    assert (schedule.steps, schedule.accumulation) == (70, 4)


MIXTURE = {"a": 1.0, "b": 3.0, "c": 0.0}


def mixed(counts=(9, 5, 4), homogeneous=False, workers=2, seed=0, weights=MIXTURE, spans=None, **options):
    """A schedule over papers of one question, the first so many of source a, and so on."""
    owners = [name for name, count in zip("abc", counts, strict=True) for _ in range(count)]
    table = episodes([1] * len(owners), width=lambda paper: 3 + paper % 5, source=owners.__getitem__)
    return Schedule(table, train(**options), seed, workers, Mixture(dict(weights), homogeneous, spans or {})), owners


def drawn(schedule, step):
    batches = [batch for rank in range(schedule.workers) for batch in schedule.micro_batches(step, rank)]
    return [row for batch in batches for group in batch.groups for row in group]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_mixture_is_drawn_by_its_weights_and_each_source_goes_round(homogeneous):
    schedule, owners = mixed(homogeneous=homogeneous, max_steps=300, epochs=1000)
    steps = [drawn(schedule, step) for step in range(schedule.steps)]
    sources = [[owners[row] for row in rows] for rows in steps]
    if homogeneous:
        assert all(len(set(names)) == 1 for names in sources)
    else:
        assert any(len(set(names)) == 2 for names in sources)
    counted = Counter(name for names in sources for name in names)
    assert set(counted) == {"a", "b"} and counted.total() == 1200
    assert counted["b"] / 1200 == pytest.approx(0.75, abs=0.08)
    for name, first in (("a", 0), ("b", 9)):
        asked = Counter(row for rows in steps for row in rows if owners[row] == name)
        assert set(asked) == set(range(first, first + owners.count(name)))
        assert max(asked.values()) < 2.2 * min(asked.values())


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_mixture_is_the_same_for_any_workers_and_from_any_step_on(homogeneous):
    options = {"homogeneous": homogeneous, "max_steps": 40, "epochs": 99, "seed": 5}
    two, _ = mixed(workers=2, **options)
    one, _ = mixed(workers=1, num_workers=1, **options)
    assert [sorted(drawn(two, step)) for step in range(40)] == [sorted(drawn(one, step)) for step in range(40)]
    again, _ = mixed(workers=2, **options)
    assert [drawn(again, step) for step in (31, 7, 31)] == [drawn(two, step) for step in (31, 7, 31)]
    other, _ = mixed(workers=2, **options | {"seed": 6})
    assert [drawn(other, step) for step in range(9)] != [drawn(two, step) for step in range(9)]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_the_tokens_of_a_training_are_about_those_of_its_steps(homogeneous):
    schedule, _ = mixed((40, 60, 5), homogeneous, max_steps=400, epochs=999)
    read = [schedule.lengths[row] for step in range(schedule.steps) for row in drawn(schedule, step)]
    assert schedule.tokens == pytest.approx(sum(read), rel=0.01)


def test_a_mixture_of_one_source_is_a_training_on_it_alone():
    table = episodes([2, 1, 3, 1, 4], width=lambda paper: 3 + paper)
    options = train(epochs=3)
    alone, mixture = Schedule(table, options, 1, 2), Schedule(table, options, 1, 2, Mixture({"papers": 2.0}, False))
    assert alone.steps == mixture.steps
    for step in range(alone.steps):
        assert [alone.micro_batches(step, r) for r in (0, 1)] == [mixture.micro_batches(step, r) for r in (0, 1)]


def test_homogeneous_steps_are_of_similar_lengths_and_come_in_no_order_of_them():
    lengths = torch.randint(1, 500, (4 * 700,), generator=torch.Generator().manual_seed(0)).tolist()
    table = episodes([1] * len(lengths), width=lengths.__getitem__, source=lambda paper: "a")
    options = train(max_steps=700, num_workers=1, micro_batch_size=4)
    spreads, means = {}, {}
    for homogeneous in (False, True):
        schedule = Schedule(table, options, 0, 1, Mixture({"a": 1.0}, homogeneous))
        steps = [[lengths[row] for row in drawn(schedule, step)] for step in range(schedule.steps)]
        assert sorted(length for step in steps for length in step) == sorted(lengths)  # an epoch, each once
        spreads[homogeneous] = sum(max(step) - min(step) for step in steps) / len(steps)
        means[homogeneous] = torch.tensor([sum(step) / 4 for step in steps])
    assert spreads[True] < 0.1 * spreads[False]
    following = torch.corrcoef(torch.stack([means[True][:-1], means[True][1:]]))[0, 1]
    assert abs(following) < 0.15


def test_a_source_is_drawn_from_between_its_start_and_its_stop_and_by_its_weight_then():
    spans = {"a": (0.5, 1.0), "b": (0.0, 0.75)}
    schedule, owners = mixed(spans=spans, weights={"a": 1.0, "b": 1.0, "c": 2.0}, max_steps=200, epochs=999)
    found = [Counter(owners[row] for step in range(first, first + 50) for row in drawn(schedule, step))
             for first in range(0, 200, 50)]  # fmt: skip
    assert [set(counted) for counted in found] == [set("bc"), set("bc"), set("abc"), set("ac")]
    shares = [counted["c"] / 200 for counted in found]
    assert shares == pytest.approx([2 / 3, 2 / 3, 1 / 2, 2 / 3], abs=0.12)


def test_a_source_without_episodes_is_named_unless_its_weight_is_zero():
    with pytest.raises(StageError, match="data.sources.b: no training episode is left of it, and its weight is 3"):
        mixed(counts=(9, 0, 4))
    mixed(counts=(9, 5, 0))


def test_batches_that_cannot_be_dealt_out_and_empty_data_are_errors():
    with pytest.raises(StageError, match="can't be dealt to 3 workers"):
        Schedule(episodes([1] * 9), train(), 0, 3)
    with pytest.raises(StageError, match="no training episodes"):
        Schedule(episodes([]), train(), 0, 2)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.data())
def test_no_other_cut_makes_the_largest_micro_batch_smaller(lengths, data):
    lengths.sort()
    parts = data.draw(st.integers(1, len(lengths)))

    def largest(cuts):
        return max((b - a) * lengths[b - 1] for a, b in pairwise(cuts))

    cuts = cut_evenly(lengths, parts)
    assert len(cuts) == parts + 1 and cuts[0] == 0 and cuts[-1] == len(lengths) and sorted(set(cuts)) == cuts
    others = ([0, *inner, len(lengths)] for inner in combinations(range(1, len(lengths)), parts - 1))
    assert largest(cuts) == min(map(largest, others))


def test_collate_pads_on_the_right_and_knows_where_answers_stand():
    table = episodes([3, 1], width=lambda paper: 4 + paper)
    batch = collate(table, [[0, 1, 2], [3]], pad_id=0)
    assert batch.context_ids.tolist() == [[3, 4, 5, 6, 0], [3, 4, 5, 6, 7]]
    assert batch.context_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, -1], [0] * 5]
    assert batch.input_ids.tolist() == [[7, 8, 0, 0], [7, 7, 8, 9], [7, 7, 7, 8], [7, 8, 0, 0]]
    assert batch.owner.tolist() == [0, 0, 0, 1]
    assert batch.answer_rows.tolist() == [0, 1, 1, 2, 3] and batch.answer_columns.tolist() == [0, 1, 2, 2, 0]
    assert batch.answer_ids.tolist() == [8, 8, 9, 8, 8]
    assert torch.equal(batch.input_ids[batch.answer_rows, batch.answer_columns + 1], batch.answer_ids)
    assert batch.answer_weights.tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 8, 1 / 4, 1 / 4])
    assert batch.tokens == 4 + 5 + 2 + 4 + 4 + 2
    assert collate(table, [[0, 1]], pad_id=0).context_mask is None


def test_the_tokens_of_an_answer_weigh_as_its_episode_says_and_each_answer_as_the_others():
    batch = collate(episodes([3, 1], weights=[1.0, 3.0]), [[0, 1, 2], [3]], pad_id=0)  # answers of 1, 2, 1 and 1 tokens
    assert batch.answer_weights.tolist() == [1 / 4, 1 / 16, 3 / 16, 1 / 4, 1 / 4]
    even = collate(episodes([3, 1]), [[0, 1, 2], [3]], pad_id=0).answer_weights
    for alike in ([], [1.0, 1.0], [3.0, 3.0]):
        assert torch.equal(collate(episodes([3, 1], weights=alike), [[0, 1, 2], [3]], pad_id=0).answer_weights, even)


def test_the_learning_rate_warms_up_and_falls_to_zero_as_transformers_does():
    from transformers import get_cosine_schedule_with_warmup

    options = Train(learning_rate=3e-4, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    reference = get_cosine_schedule_with_warmup(optimizer, 7, 70)
    for step in range(70):
        assert learning_rate(options, step, 70) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        reference.step()


def test_a_batch_knows_whose_its_contexts_are():
    table = episodes([2, 1, 3])
    batch = collate(table, [[0, 1], [2], [3, 4]], 0)
    assert batch.papers == ["p0", "p1", "p2"] and batch.sources == ["papers"] * 5
