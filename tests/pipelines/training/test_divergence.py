"""A training that comes apart is told from every other course that losses take."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Train
from pipelines.errors import StageError
from pipelines.training.divergence import WINDOW, Divergence

CURVES = Path(__file__).with_name("curves.csv")
TRAIN, STEPS = Train(learning_rate=4e-3, warmup_ratio=0.01), 4000


def watch(losses, norms, began=None, first=1) -> Divergence:
    watching = Divergence(TRAIN, STEPS, began)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
        watching.add({"loss": loss, "gradient norm": norm}, step)
    return watching


def noisy(level: float, steps: int, seed: int, spread: float = 0.4) -> np.ndarray:
    return level * np.exp(np.random.default_rng(seed).normal(0, spread, steps))


def recorded(training: str) -> tuple[list[float], list[float]]:
    """Run 15 of docs/remember.md: steps 1 to 100 and 1,151 to 1,600 of one seed, 1 to 600 of the other."""
    rows = [row for row in csv.DictReader(CURVES.read_text().splitlines()) if row["training"] == training]
    return [float(row["loss"]) for row in rows], [float(row["gradient norm"]) for row in rows]


def test_a_training_that_did_diverge_ends_while_its_loss_is_low_yet():
    losses, norms = recorded("diverged")
    with pytest.raises(StageError, match=r"from its first 100 .* the loss from 1\.35 to .*rate, which rose to 0.004"):
        watch(losses, norms)
    before_the_first_spike = 150
    watch(losses[:before_the_first_spike], norms[:before_the_first_spike])


def test_one_that_did_not_goes_on():
    watch(*recorded("healthy"))


def test_a_training_that_goes_on_from_a_diverged_checkpoint_ends_too():
    losses, norms = recorded("diverged")
    began = watch(losses[:WINDOW], norms[:WINDOW]).began
    with pytest.raises(StageError, match="up to step 1900"):
        watch(losses[-WINDOW:], norms[-WINDOW:], began, first=1801)


@pytest.mark.parametrize(
    ("losses", "norms"),
    [(noisy(3.0, 100, 0), noisy(0.5, 100, 1)), (noisy(0.2, 100, 0), noisy(1e4, 100, 1))],
    ids=["harder texts", "rare texts with large gradients"],
)
def test_one_of_both_alone_is_no_divergence(losses, norms):
    watch([*noisy(0.2, 200, 2), *losses], [*noisy(0.5, 200, 3), *norms])


def test_spikes_are_none():
    norms = noisy(0.46, 4000, 1)
    norms[::11] = 1e9
    watch(noisy(1.2, 4000, 0), norms)


@given(st.integers(0, 10**6), st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_what_falls_or_stays_never_ends(seed, loss, norm):
    falling = np.linspace(1, 0.3, 400)
    watch(noisy(loss, 400, seed, 0.5) * falling, noisy(norm, 400, seed + 1, 0.5) * falling)
