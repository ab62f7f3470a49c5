"""What a δ-mem training asks of its episodes."""

import pyarrow as pa
import pytest

from pipelines.errors import StageError
from pipelines.strategies.delta import need_segments


def test_ssw_is_not_trained_where_there_is_nothing_to_write():
    def episodes(*segments):
        return pa.Table.from_pylist([{"question_id": f"q{i}", "segment_ids": s} for i, s in enumerate(segments)])

    need_segments(episodes([-1, 0, 0], [0]), "tiny")
    with pytest.raises(StageError, match="question q1: the chat template of tiny changes the texts.*tsw or msw"):
        need_segments(episodes([-1, 0], [-1, -1]), "tiny")
