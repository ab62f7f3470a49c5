"""Drawn answers: the distribution is that of transformers' own processors, the luck that of the question."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipelines.evaluation.sampling import RELEASE, Draws


def test_the_releases_settings_are_those_of_its_script():
    assert RELEASE == (0.4, 0.9, 10, 42)


def test_tokens_are_drawn_as_often_as_transformers_processors_would():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 0.6
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.4), TopKLogitsWarper(10), TopPLogitsWarper(0.9)])
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)[0]
    count = 4000
    drawn = Draws(RELEASE, [f"q{number}" for number in range(count)])(logits.expand(count, -1))
    found = torch.bincount(drawn, minlength=40) / count
    assert set(drawn.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert 1 < (expected > 0).sum() < 10  # both limits cut something off
    assert torch.allclose(found, expected, atol=4 * (0.25 / count) ** 0.5)


def test_an_answers_luck_is_its_questions_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    names = ["a", "b", "c"]
    together = Draws(RELEASE, names)
    alone = [Draws(RELEASE, [name]) for name in names]
    for _ in range(5):
        expected = [one(logits[row : row + 1]).item() for row, one in enumerate(alone)]
        assert together(logits).tolist() == expected
    again = Draws(RELEASE, names * 40)(torch.zeros(120, 50)).tolist()
    assert again[:3] == again[3:6] and len(set(again[:3])) > 1


@pytest.mark.parametrize("luck", ["q", "another"])
def test_a_token_that_is_certain_is_always_drawn(luck):
    logits = torch.full((1, 5), -50.0)
    logits[0, 3] = 50.0
    assert Draws(RELEASE, [luck])(logits).item() == 3
