"""What texts have beside them: fixed by seed and step, whole documents apart, the same however a step is cut up."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from deltamem import DeltaMemConfig, get_delta_mem_model
from pipelines.config import Train
from pipelines.training.batches import Read, collate
from pipelines.training.beside import Beside, Companions, contrast_weight
from pipelines.training.objective import MemoryObjective
from pipelines.training.schedule import Schedule
from tests.pipelines.training.episodes import episodes

PAPERS = [2, 1, 3, 1, 2, 1, 1, 4, 1, 1]
ALL = {
    "contrast": {"weight": 0.5, "until": 1.0},
    "repeat_text": {"weight": 0.3, "texts": 3, "max_tokens": 9},
    "write_after": {"texts": [0, 1, 3], "shares": [1.0, 1.0, 1.0]},
}


def table():
    return episodes(PAPERS, width=lambda paper: 4 + paper % 7)


def schedule(workers=1, micro=8, seed=3, **changes):
    values = {"batch_size": 16, "micro_batch_size": 2 * micro, "questions_per_write": 2, "num_workers": workers,
              "max_steps": 30, "epochs": 99}  # fmt: skip
    train = Train.model_validate({**values, **ALL, **changes})
    return Schedule(table(), train, seed, workers, companions=Companions.of(table(), train, seed))


def step_of(made, step):
    return [micro for rank in range(made.workers) for micro in made.micro_batches(step, rank)]


def told(made, step):
    """{row asked of: (papers written after its text, those in the other memory, whether its text is repeated)}."""
    papers, found = table()["paper_id"].to_pylist(), {}
    for micro in step_of(made, step):
        beside = micro.beside
        texts = [group[0] for group in micro.groups] + beside.more
        chains = [[papers[row], *(papers[rows[i]] for rows in beside.after)] for i, row in enumerate(texts)]
        for number, group in enumerate(micro.groups):
            other = None if beside.others is None else tuple(chains[beside.others[number]])
            found[group[0]] = tuple(chains[number]), other, number in (beside.repeated or ())
    return found


def test_it_is_the_same_for_any_workers_and_micro_batches_and_from_any_step_on():
    whole = schedule()
    for other in (schedule(micro=1), schedule(workers=2, micro=2), schedule(workers=4, micro=1)):
        assert [told(other, step) for step in (7, 2, 11)] == [told(whole, step) for step in (7, 2, 11)]
    assert [told(schedule(seed=4), step) for step in range(5)] != [told(whole, step) for step in range(5)]


def test_the_right_text_is_in_no_memory_that_it_is_told_from_and_no_text_comes_twice():
    made, lengths = schedule(), set()
    for step in range(30):
        for right, wrong, _ in told(made, step).values():
            assert len(set(right + wrong)) == len(right) + len(wrong)
            lengths.add(len(right))
    assert {1, 2, 4} <= lengths <= {1, 2, 3, 4}  # 3 where a step has few documents


def test_so_many_short_texts_are_repeated_and_no_long_one():
    written, made = table()["context_ids"].to_pylist(), schedule()
    for step in range(30):
        chosen = [row for row, (_, _, repeated) in told(made, step).items() if repeated]
        short = [row for row in told(made, step) if len(written[row]) <= 9]
        assert set(chosen) <= set(short) and len(chosen) <= 3
        weights = [m.weight * m.beside.repeat_weight * len(m.beside.repeated) for m in step_of(schedule(micro=2), step)
                   if m.beside.repeated]  # fmt: skip
        assert sum(weights) == pytest.approx(4)  # of four micro-batches: their mean counts every text alike


def test_numbers_of_later_texts_come_in_their_shares():
    after = {"texts": [0, 2], "shares": [3.0, 1.0]}
    made = schedule(write_after=after, contrast=None, max_steps=400, epochs=999)
    drawn = Counter(len(made.micro_batches(step, 0)[0].beside.after) for step in range(400))
    assert set(drawn) == {0, 2} and drawn[2] / 400 == pytest.approx(0.25, abs=0.07)


def test_the_contrast_is_full_then_falls_to_nothing():
    train = Train.model_validate({"contrast": {"weight": 0.5, "until": 0.5}})
    weights = [contrast_weight(train, progress) for progress in (0.0, 0.3, 0.4, 0.5, 0.9)]
    assert weights == pytest.approx([0.5, 0.5, 0.25, 0.0, 0.0])
    made = schedule(contrast={"weight": 0.5, "until": 0.5})
    assert made.micro_batches(14, 0)[0].beside.others and made.micro_batches(15, 0)[0].beside.others is None


def test_a_step_of_few_documents_writes_as_many_after_as_it_has():
    two = episodes([3, 3])
    options = Train.model_validate({**ALL, "batch_size": 6, "micro_batch_size": 6, "epochs": 99, "max_steps": 20})
    made = Schedule(two, options, 0, 1, companions=Companions.of(two, options, 0))
    assert all(not made.micro_batches(step, 0)[0].beside.after for step in range(20))
    one = episodes([3])
    made = Schedule(one, options, 0, 1, companions=Companions.of(one, options, 0))
    assert all(made.micro_batches(step, 0)[0].beside.others is None for step in range(20))


def test_nothing_follows_on_nothing_written_and_it_is_nobody_s_other_text():
    data = episodes(PAPERS, width=lambda paper: 0 if paper % 3 == 0 else 5)
    values = {"batch_size": 16, "micro_batch_size": 8, "questions_per_write": 2, "max_steps": 30, "epochs": 99}
    train = Train.model_validate({**values, **ALL})
    made = Schedule(data, train, 3, 1, companions=Companions.of(data, train, 3))
    papers, written = data["paper_id"].to_pylist(), [bool(ids) for ids in data["context_ids"].to_pylist()]
    seen = set()
    for micro in (micro for step in range(30) for micro in made.micro_batches(step, 0)):
        texts = [group[0] for group in micro.groups] + micro.beside.more
        for later in micro.beside.after:
            assert [written[row] for row in later] == [written[row] for row in texts]
        for row, other in zip(texts, micro.beside.others or (), strict=False):
            other = texts[other]
            assert written[other] == written[row] and (papers[other] != papers[row]) == written[row]
            seen.add(written[row])
        assert all(written[texts[place]] for place in micro.beside.repeated or ())
    assert seen == {True, False}


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tsw", "ssw", "msw"])
def objective(tiny_model, request):
    torch.manual_seed(0)
    config = DeltaMemConfig(strategy=request.param, alpha=1600)  # an effect to see
    return MemoryObjective(get_delta_mem_model(tiny_model("qwen3", "sdpa"), config), 0.0, 0.05, repeat_weight=0.3)


def repetitions(rows, micro):
    """Prompts of one token with a text's own tokens as answers."""
    repeated = micro.beside.repeated or []
    return [Read([7], rows[micro.groups[place][0]], place) for place in repeated]


def losses(objective, made, step):
    """(loss, contrast, repeat NLL) of a step, as the training loop weighs its micro-batches."""
    rows, parts = table()["context_ids"].to_pylist(), []
    micro_batches = step_of(made, step)
    for micro in micro_batches:
        result = objective(collate(table(), micro.groups, 0, micro.beside, repetitions(rows, micro)))
        parts.append(torch.stack([result.loss, result.contrast, result.repeat_nll]) * micro.weight)
    return torch.stack(parts).mean(0)


def by_definition(objective, made, step):
    """The same written out, a question at a time."""
    (model,), data = objective.model, table().to_pylist()
    rows = {row["paper_id"]: row for row in data[::-1]}

    def memory_of(chain):
        memory = None
        for paper in chain:
            ids, segments = (torch.tensor([rows[paper][name]]) for name in ("context_ids", "segment_ids"))
            memory = model.write(ids, memory=memory, segment_ids=segments)
        return memory

    def nll(asked, answer, memory):
        logits = model(torch.tensor([asked + answer]), memory=memory, write=False).logits[0, len(asked) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(answer))

    answers, contrasts, repeats = [], [], []
    for micro in step_of(made, step):
        for group in micro.groups:
            right, wrong, repeated = told(made, step)[group[0]]
            for row in (data[number] for number in group):
                pair = [nll(row["question_ids"], row["answer_ids"], memory_of(chain)) for chain in (right, wrong)]
                answers.append(pair[0])
                contrasts.append(F.softplus(1 - (pair[1] - pair[0])))
            if repeated:
                repeats.append(nll([7], data[group[0]]["context_ids"], memory_of(right[:1])))
    answer, contrast, repeat = (torch.stack(part).mean() for part in (answers, contrasts, repeats))
    return torch.stack([answer + 0.5 * contrast + 0.3 * repeat, contrast, repeat])


def test_the_loss_is_its_definition_however_a_step_is_cut_up(objective):
    made = schedule()
    step = next(s for s in range(30) if len(made.micro_batches(s, 0)[0].beside.after) == 3
                and made.micro_batches(s, 0)[0].beside.contrast == 0.5)  # fmt: skip
    with torch.no_grad():
        expected = by_definition(objective, made, step)
        for cut in (made, schedule(micro=2), schedule(workers=2, micro=1)):
            torch.testing.assert_close(losses(objective, cut, step), expected, atol=1e-5, rtol=1e-4)


def test_what_has_no_other_memory_is_not_told_from_its_own(objective):
    data = episodes([1, 1, 2], width=lambda paper: (0, 6, 9)[paper])
    with torch.no_grad():
        one, three = (
            objective(collate(data, groups, 0, Beside(others=others, contrast=0.5)))
            for groups, others in (([[1], [2, 3]], [1, 0]), ([[0], [1], [2, 3]], [0, 2, 1]))
        )
    torch.testing.assert_close(three.contrast, one.contrast * 3 / 4, atol=1e-6, rtol=1e-4)


def test_every_part_teaches_the_writing(objective):
    micro = schedule().micro_batches(0, 0)[0]
    rows = table()["context_ids"].to_pylist()
    batch = collate(table(), micro.groups, 0, micro.beside, repetitions(rows, micro))
    plain = MemoryObjective(objective.model[0], 0.0, 0.05)
    whole, answers = objective(batch), plain(collate(table(), micro.groups, 0))
    assert answers.contrast is None and answers.repeat_nll is None
    name = next(name for name, _ in objective.named_parameters() if name.endswith("in_proj"))
    gradients = [
        torch.autograd.grad(loss, dict(objective.named_parameters())[name])[0] for loss in (whole.loss, answers.loss)
    ]
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[1].norm()
