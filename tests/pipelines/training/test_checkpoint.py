"""Which of a training's checkpoints it goes on from."""

import os

import pytest
import torch

from pipelines.training import checkpoint
from tests.full_disk import full_disk


def saved(folder, step):
    folder.mkdir(parents=True)
    checkpoint.save(folder, {"master.adapter.x": torch.full((64,), float(step))}, step, {"workers": []})
    return folder


@pytest.fixture
def three(tmp_path):
    """Checkpoints of three tries, the later ones with earlier names, as after a clock that was set back."""
    return [saved(tmp_path / f"try-{n}" / f"checkpoint_{9 - n}", step=10 * n) for n in (1, 2, 3)]


def test_the_latest_step_counts_and_not_the_clock(tmp_path, three):
    assert checkpoint.newest(tmp_path) == three[2]
    assert checkpoint.load(three[2])[1] == {"step": 30, "workers": []}


@pytest.mark.parametrize("damage", [
    lambda folder: os.truncate(folder / "trainer_state.safetensors", 200),
    lambda folder: (folder / "trainer_state.safetensors").write_bytes(b"\0" * 400),
    lambda folder: os.truncate(folder / "trainer_state.json", 9),
    lambda folder: (folder / "trainer_state.json").unlink(),
    lambda folder: (folder / "trainer_state.sha256").unlink(),
], ids=["cut short", "zeros", "record cut short", "no record", "no digest"])  # fmt: skip
def test_one_that_is_not_whole_is_passed_over(tmp_path, three, damage):
    damage(three[2])
    assert checkpoint.newest(tmp_path) == three[1]


def test_there_is_none_where_none_is_whole(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    with full_disk(300), pytest.raises(OSError, match="too large"):
        saved(tmp_path / "checkpoint_1", step=1)
    assert checkpoint.newest(tmp_path) is None
