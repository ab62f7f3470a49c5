"""The table of kinds: complete, and every name in it leads somewhere."""

from pkgutil import resolve_name
from typing import get_args

import pytest

from pipelines.config.strategies import Strategy
from pipelines.strategies.kinds import KINDS
from pipelines.strategies.transform import ContextTransform
from pipelines.training.recipe import Recipe


def test_every_entry_of_a_configuration_has_its_row():
    union, *_ = get_args(Strategy)
    assert {kind.settings for kind in KINDS.values()} == set(get_args(union))
    for name, kind in KINDS.items():
        assert get_args(kind.settings.model_fields["kind"].annotation) == (name,)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_trained_and_loaded_or_transforms_contexts(name):
    kind = KINDS[name]
    if kind.settings.trained:
        assert issubclass(resolve_name(kind.recipe), Recipe) and callable(resolve_name(kind.load))
        assert kind.transform is None and resolve_name(kind.recipe).has_memory == kind.has_memory
    else:
        assert issubclass(resolve_name(kind.transform), ContextTransform)
        assert kind.recipe is kind.load is None and not kind.has_memory
