"""What a δ-mem training asks of its episodes."""

import pyarrow as pa
import pytest

from deltamem.chat.format import encode_messages
from pipelines.config import resolve_config
from pipelines.data.shards import SCHEMA
from pipelines.errors import StageError
from pipelines.strategies.delta import DeltaRecipe, need_segments


def test_ssw_is_not_trained_where_there_is_nothing_to_write():
    def episodes(*segments):
        return pa.Table.from_pylist([{"question_id": f"q{i}", "segment_ids": s} for i, s in enumerate(segments)])

    need_segments(episodes([-1, 0, 0], [], [0]), "tiny")  # of no tokens at all there is nothing to tell
    need_segments(episodes([]), "tiny")
    with pytest.raises(StageError, match="question q1: the chat template of tiny changes the texts.*tsw or msw"):
        need_segments(episodes([-1, 0], [-1, -1]), "tiny")


@pytest.mark.parametrize(
    "adapter,expected",
    [
        ({"segment": "message"}, ["a. b: c", "d"]),
        ({"segment": "sentence"}, ["a. ", "b: c", "d"]),
        ({"segmentation": "release"}, ["<|im_start|>user\na. b: c<|im_end|>\n", "<|im_start|>user\nd<|im_end|>\n"]),
        ({"segment": "sentence", "segmentation": "release"}, ["a.", " b:", " c", "d"]),
    ],
    ids=["message", "sentence", "release_message", "release_sentence"],
)
def test_ssw_trains_on_the_segments_that_its_adapter_names(adapter, expected, tiny_backbone, tmp_path):
    settings = {
        "name": "run", "results_dir": str(tmp_path), "backbones": ["tiny-random"], "benchmarks": ["qasper"],
        "strategies": {"ssw": {"adapter": {"strategy": "ssw", **adapter}}}, "data": {"source": "generated"},
    }  # fmt: skip
    config = resolve_config(settings, "test")
    recipe = DeltaRecipe(config, config.cell("tiny-random", "ssw", 42))
    recipe.folder = tiny_backbone
    messages = [{"role": "user", "content": content} for content in ("a. b: c", "d")]
    written = encode_messages(recipe.tokenizer, messages, segment=None)
    rows = [
        {"paper_id": "p", "question_id": f"q{number}", "context_ids": written.input_ids,
         "segment_ids": written.segment_ids, "messages": messages, "question_ids": [5], "answer_ids": [6, number],
         "source": "papers", "prompt": messages}
        for number in range(3)
    ]  # fmt: skip
    rows.append({**rows[0], "paper_id": "first", "context_ids": [], "segment_ids": [], "messages": []})
    episodes, _ = recipe.usable(pa.Table.from_pylist(rows, schema=SCHEMA))
    assert episodes["segment_ids"].to_pylist()[3] == []
    batch = recipe.collate(episodes, [[2, 0], [1]])
    assert batch.answer_ids.tolist() == [6, 2, 6, 0, 6, 1] and batch.owner.tolist() == [0, 0, 1]
    for ids, segments in zip(batch.context_ids, batch.segment_ids, strict=True):
        texts = [recipe.tokenizer.decode(ids[segments == number]) for number in range(int(segments.max()) + 1)]
        assert texts == expected
