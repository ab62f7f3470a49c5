"""The headline numbers: what two or three conditions say together, for the result files and the report alike.

``memory_effect``: state − swapped over the same questions, with a verdict; what it matters that the memory is of
the right document. ``context_recovery``: (state − none) / (full − none); how much of what the history in the prompt
is worth the memory brings back. Where they were asked, ``corpus_effect``: state − unrelated; what it matters that the
memory is of the benchmark at all; ``layer_effect``: state − permuted; what it matters that each layer finds its own
state; ``steering_effect``: state − strength_0, and ``empty_effect``: none − strength_0; what a filled and an empty
memory are worth against the frozen backbone, or cost. All are positive where memory helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.config.conditions import condition
from pipelines.evaluation.statistics import Bootstrap, Estimate, paired_differences, recoveries, verdict

_Key = TypeVar("_Key")


class Effect(NamedTuple):
    """A number made of several conditions.

    Attributes:
        needs: the conditions, in the order in which ``estimate`` takes their gains, [n, K] each.
        is_difference: whether it is the first condition minus the second, and so has a verdict.
    """

    needs: tuple[str, ...]
    estimate: Callable[..., list[Estimate]]
    is_difference: bool


EFFECTS = {
    "memory_effect": Effect(("state", "swapped"), paired_differences, is_difference=True),
    "corpus_effect": Effect(("state", "unrelated"), paired_differences, is_difference=True),
    "layer_effect": Effect(("state", "permuted"), paired_differences, is_difference=True),
    "steering_effect": Effect(("state", "strength_0"), paired_differences, is_difference=True),
    "empty_effect": Effect(("none", "strength_0"), paired_differences, is_difference=True),
    "context_recovery": Effect(("none", "state", "full"), recoveries, is_difference=False),
}


def layer_effects(
    gains: Mapping[str, NDArray[np.float64]], clusters: Sequence[str] | NDArray, how: Bootstrap
) -> dict[int, Estimate]:
    """state − the state with one layer swapped, by layer: what it matters that this layer's state is the right one.

    Args:
        gains: {condition: [n] scores, more is better}, of ``state`` and of single layers.
    """
    columns = {layer: gains[name] for name in gains if (layer := condition(name).layer_swapped) is not None}
    layers = sorted(columns)
    swapped = np.stack([columns[layer] for layer in layers], axis=1)
    return dict(zip(layers, paired_differences(gains["state"][:, None], swapped, clusters, how), strict=True))


def effects(
    gains: Mapping[_Key, Mapping[str, NDArray[np.float64]]], clusters: Sequence[str] | NDArray, how: Bootstrap
) -> Iterator[tuple[str, _Key, Estimate, str]]:
    """Every effect of every column whose conditions are there: its name, the column's key, the estimate, its verdict.

    Args:
        gains: {key: {condition: [n] scores, more is better}}.
        clusters: [n] the document of each question.
    """
    for name, effect in EFFECTS.items():
        known = [key for key, column in gains.items() if column.keys() >= set(effect.needs)]
        if known:
            columns = (np.stack([gains[key][condition] for key in known], axis=1) for condition in effect.needs)
            for key, found in zip(known, effect.estimate(*columns, clusters, how), strict=True):
                yield name, key, found, verdict(found) if effect.is_difference else ""
