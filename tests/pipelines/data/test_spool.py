"""Values that wait in a file: the same as often as one likes, and little of them in memory."""

import tracemalloc

import pytest

from pipelines.data.spool import Spool
from pipelines.errors import StageError
from tests.full_disk import full_disk


def test_values_come_back_in_their_order_as_often_as_one_likes():
    spool = Spool(range(3))
    assert list(zip(spool, spool, strict=True)) == [(0, 0), (1, 1), (2, 2)] and len(spool) == 3


def test_many_take_no_more_memory_than_few():
    def peak(count):
        tracemalloc.start()
        assert sum(map(len, Spool("x" * 10_000 for _ in range(count)))) == count * 10_000
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2000) < peak(20) + 500_000  # of 20 MB


def test_a_full_disk_is_named():
    for size in (10, 10_000):
        with full_disk(), pytest.raises(StageError, match="No room to write in"):
            Spool("x" * size for _ in range(100))
