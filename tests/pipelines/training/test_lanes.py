"""Memories that go on from step to step: which, with what in them, and that they hold what their texts wrote."""

from itertools import chain

import pytest
import torch
from pydantic import ValidationError

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.config import Train
from pipelines.training.batches import collate
from pipelines.training.lanes import NOWHERE
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import Schedule
from tests.pipelines.training.episodes import episodes

STEPS, EVERY = 40, 8


def empty(paper):
    return paper % 7 == 3


def made(carry=None, workers=1, seed=0, **options):
    """A table of forty papers of two questions, some of no text, and their schedule."""
    table = episodes([2] * 40, width=lambda paper: 0 if empty(paper) else 4 + paper % 9)
    values = {
        "batch_size": 16, "micro_batch_size": 16 // workers, "questions_per_write": 2, "num_workers": workers,
        "max_steps": STEPS, "epochs": 999, "checkpoint_every": 2 * EVERY,
        "carry_memory": {"share": 0.75, "texts": 3, "ask_earlier": 0.5, "anew_every": EVERY} | (carry or {}),
    }  # fmt: skip
    train = Train.model_validate(values | options)
    return table, train, Schedule(table, train, seed, workers, carries=True)


def lanes_of(schedule, step, rank=0):
    """(group, its lane) of a worker's step."""
    micro_batches = schedule.micro_batches(step, rank)
    return list(chain(*(zip(micro.groups, micro.beside.lanes, strict=True) for micro in micro_batches)))


@pytest.mark.parametrize("micro", [8, 16])
def test_a_lane_holds_the_texts_that_were_left_in_it_and_is_asked_about_one_of_them(micro):
    table, train, schedule = made(seed=4, micro_batch_size=micro)
    has_text = [bool(ids) for ids in table["context_ids"].to_pylist()]
    texts, begun, earlier, went_on = {}, {}, 0, 0
    for step in range(STEPS):
        seen = lanes_of(schedule, step)
        assert [group for group, _ in seen] == list(chain(*schedule._batches(step)))
        ends = [lane.ends for _, lane in seen if lane.ends != NOWHERE]
        assert len(set(ends)) == len(ends) and all(0 <= end < train.lanes for end in ends)
        for group, (begins, its, asked) in seen:
            if not has_text[group[0]]:
                assert (begins, its, asked) == (NOWHERE, NOWHERE, group)
                continue
            assert begins in (NOWHERE, its) and not (begins == its and step % EVERY == 0)
            texts[its] = [*(texts[its] if begins == its else []), group]
            assert asked in texts[its]
            earlier += asked is not group
            went_on += begins == its
            begun[its] = begun.get(its, 0) + (begins == its)
    of_share = [count for count in begun.values() if count]  # the others never go on
    assert 0.4 * len(begun) < len(of_share) < len(begun) and sum(of_share) == went_on > 100
    assert 0.3 * went_on < earlier < 0.7 * went_on


def test_lanes_are_the_same_for_any_number_of_workers():
    _, _, one = made(micro_batch_size=8)
    _, _, two = made(workers=2)
    for step in range(STEPS):
        alone, shared = lanes_of(one, step), [lanes_of(two, step, rank) for rank in (0, 1)]
        assert alone == [*shared[0], *shared[1]] and any(lane.begins != NOWHERE for _, lane in alone) == (
            step % EVERY != 0
        )


def test_lanes_are_the_same_from_any_step_on_and_others_for_another_seed():
    _, _, first = made()
    steps = [lanes_of(first, step) for step in range(STEPS)]
    _, _, again = made()
    assert [lanes_of(again, step) for step in (30, 7, 31)] == [steps[step] for step in (30, 7, 31)]
    _, _, other = made(seed=1)
    assert [lanes_of(other, step) for step in range(STEPS)] != steps


def test_questions_count_alike_however_many_a_micro_batch_asks():
    _, _, schedule = made(workers=2, batch_size=32)
    for step in range(STEPS):
        micro_batches = [micro for rank in (0, 1) for micro in schedule.micro_batches(step, rank)]
        asked = [sum(len(lane.asked) for lane in micro.beside.lanes) for micro in micro_batches]
        for micro, count in zip(micro_batches, asked, strict=True):
            assert micro.weight == pytest.approx(count * len(micro_batches) / sum(asked))


def test_a_checkpoint_that_would_lose_memories_is_refused():
    with pytest.raises(ValidationError, match="checkpoint_every, 12, is no multiple of carry_memory.anew_every, 8"):
        made(checkpoint_every=12)


def make_objective(tiny_model, train, **settings):
    torch.manual_seed(0)
    model = get_delta_mem_model(tiny_model("qwen3", "sdpa"), DeltaMemConfig(alpha=160, **settings))
    return MemoryObjective(model, 0.0, 0.05, lanes=train.lanes)


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_a_memory_that_goes_on_is_that_of_its_texts_one_after_the_other(tiny_model, strategy):
    table, train, schedule = made(carry={"share": 1.0, "texts": 9})
    objective = make_objective(tiny_model, train, strategy=strategy)
    (model,), texts, checked = objective.model, {}, 0
    for step in range(12):
        (micro,) = schedule.micro_batches(step, 0)
        batch = collate(table, micro.groups, 0, micro.beside)
        result = objective(batch)
        for place, (group, (begins, ends, asked)) in enumerate(zip(micro.groups, micro.beside.lanes, strict=True)):
            if ends == NOWHERE:
                continue
            texts[ends] = [*(texts[ends] if begins == ends else []), group]
            memory = None
            for written in texts[ends]:
                alone = collate(table, [written], 0)
                memory = model.write(alone.context_ids, memory=memory, segment_ids=alone.segment_ids)
            torch.testing.assert_close(result.states[:, place], torch.stack([s[0] for s in memory.states.values()]))
            if len(texts[ends]) > 2:
                alone = collate(table, [asked], 0)
                logits = model(alone.input_ids, memory=memory.select([0] * len(asked)), write=False).logits
                nll = torch.nn.functional.cross_entropy(
                    logits[alone.answer_rows, alone.answer_columns], alone.answer_ids, reduction="none"
                )
                rows = [row for row, owner in enumerate(batch.owner.tolist()) if owner == place]
                own = torch.isin(batch.answer_rows, torch.tensor(rows))
                torch.testing.assert_close(result.token_nll[own], nll.detach(), atol=1e-5, rtol=1e-4)
                checked += asked is not group
    assert checked > 5


def test_no_gradient_goes_back_to_earlier_steps_and_looking_leaves_nothing(tiny_model):
    table, train, schedule = made(carry={"share": 1.0, "texts": 9})
    objective = make_objective(tiny_model, train)
    (first,), (second,) = schedule.micro_batches(0, 0), schedule.micro_batches(1, 0)
    objective(collate(table, first.groups, 0, first.beside)).loss.backward()
    left = objective.left.clone()
    assert left.abs().max() > 0 and not left.requires_grad
    with torch.no_grad():
        objective(collate(table, second.groups, 0, second.beside))
        objective(collate(table, second.groups, 0))
    assert torch.equal(objective.left, left)
    objective(collate(table, second.groups, 0, second.beside)).loss.backward()
    assert not torch.equal(objective.left, left)
