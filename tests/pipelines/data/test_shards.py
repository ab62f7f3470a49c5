"""Shards of episodes: round trip, same bytes, memory mapping, streaming, damage, and a full disk."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.shards import (
    MIXTURE_SCHEMA,
    PAPER_SCHEMA,
    SCHEMA,
    open_episodes,
    read_rows,
    whole_chat,
    write_manifest,
    write_shards,
)
from pipelines.errors import StageError
from pipelines.run.files import check_free_space, replacing


def make_rows(count, length=200):
    return [
        {
            "paper_id": f"p{number // 3}",
            "question_id": f"q{number}",
            "context_ids": np.arange(length, dtype=np.int32) + number,
            "segment_ids": np.full(length, -1, dtype=np.int32),
            "messages": [{"role": "user", "content": "Größe 機械"}],
            "question": "What?",
            "question_ids": np.array([1, 2, number], dtype=np.int32),
            "answer": "x",
            "answer_ids": np.array([number], dtype=np.int32),
            "answer_type": "extractive",
            "references": ["x", "y"][: number % 3],
            "source": "squad",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
            "answer_weights": [None, [3.0]][number % 2],
        }
        for number in range(count)
    ]


@pytest.fixture
def episodes(tmp_path):
    """A folder of 100 episodes in several shards."""
    folder = tmp_path / "train"
    with replacing(folder) as partial:
        write_manifest(partial, {"shards": write_shards(make_rows(100), partial, 50_000)})
    return folder


def test_round_trip(episodes):
    table = open_episodes(episodes)
    expected = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()}
        for row in make_rows(100)
    ]
    assert table.schema == SCHEMA
    assert table.to_pylist() == expected
    assert len(list(episodes.glob("shard-*.arrow"))) > 1
    assert sorted(path.name for path in episodes.parent.iterdir()) == ["train"]


def test_papers_get_the_columns_that_their_shards_lack(tmp_path):
    write_manifest(tmp_path, {"shards": write_shards(make_rows(50), tmp_path, 9_000, PAPER_SCHEMA)})
    assert len(list(tmp_path.glob("shard-*.arrow"))) > 1
    table = open_episodes(tmp_path)
    assert table.schema == SCHEMA
    assert table.select(PAPER_SCHEMA.names).to_pylist() == [
        {key: row[key] for key in PAPER_SCHEMA.names} for row in table.to_pylist()
    ]
    assert table["prompt"].to_pylist() == [[{"role": "user", "content": "What?"}]] * 50
    assert set(table["source"].to_pylist()) == {"papers"}


def test_answers_of_a_mixture_without_weights_are_weighed_evenly(tmp_path):
    write_manifest(tmp_path, {"shards": write_shards(make_rows(50), tmp_path, 9_000, MIXTURE_SCHEMA)})
    table = open_episodes(tmp_path)
    assert table.schema == SCHEMA and table["answer_weights"].null_count == 50
    assert table.select(MIXTURE_SCHEMA.names).to_pylist() == [
        {key: row[key] for key in MIXTURE_SCHEMA.names} for row in table.to_pylist()
    ]


def test_the_whole_chat_of_a_row_has_nothing_twice():
    def said(*texts):
        return [{"role": text.split()[0], "content": text} for text in texts]

    system, told, asked = said("system be brief", "user told", "user asked")
    assert whole_chat({"messages": [told], "prompt": [asked]}) == [told, asked]
    assert whole_chat({"messages": [system, told], "prompt": [system, asked]}) == [system, told, asked]
    assert whole_chat({"messages": [system, told, asked], "prompt": [system, asked]}) == [system, told, asked]


def test_some_rows_and_columns(episodes):
    table, columns = open_episodes(episodes), ["question_id", "context_ids"]
    assert table.column(0).num_chunks > 3
    assert read_rows(table, [71, 3, 3], columns) == table.select(columns).take([71, 3, 3]).to_pylist()


def test_no_rows(tmp_path):
    write_manifest(tmp_path, {"shards": write_shards([], tmp_path, 1000)})
    assert open_episodes(tmp_path).num_rows == 0


def test_same_rows_give_the_same_bytes(episodes, tmp_path):
    again = write_shards(iter(make_rows(100)), tmp_path, 50_000)
    assert again == json.loads((episodes / "manifest.json").read_text())["shards"]


def test_opening_maps_and_copies_nothing(tmp_path):
    write_manifest(tmp_path, {"shards": write_shards(make_rows(400, 20_000), tmp_path, 10**7)})
    before = pa.total_allocated_bytes()
    table = open_episodes(tmp_path)
    assert table.nbytes > 50e6
    assert pa.total_allocated_bytes() - before < 1e6


def test_streams(episodes):
    files = sorted(str(path) for path in episodes.glob("shard-*.arrow"))
    stream = datasets.load_dataset("arrow", data_files=files, split="train", streaming=True)
    assert [row["question_id"] for row in stream] == [f"q{number}" for number in range(100)]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty"])
def test_damaged_shard_is_named(episodes, damage):
    shard = episodes / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes({"flip": content, "cut": content[:-100], "empty": b""}[damage])
    with pytest.raises(StageError) as error:
        open_episodes(episodes)
    assert str(shard) in str(error.value)
    assert ("missing" if damage == "missing" else "corrupt") in str(error.value)
    assert f"delete {episodes} and run the preprocess stage again" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"shards"'])
def test_damaged_manifest(episodes, content):
    (episodes / "manifest.json").write_text(content)
    with pytest.raises(StageError, match=r"manifest\.json: damaged .*run the preprocess stage again"):
        open_episodes(episodes)


def test_folder_without_episodes(tmp_path):
    with pytest.raises(StageError, match="no episodes here .*run the preprocess stage"):
        open_episodes(tmp_path)


def test_failure_leaves_the_old_folder(episodes):
    before = {path.name: path.read_bytes() for path in episodes.iterdir()}
    with pytest.raises(RuntimeError), replacing(episodes) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in episodes.iterdir()} == before
    assert list(episodes.parent.iterdir()) == [episodes]


def test_leftover_of_a_killed_run_is_replaced(episodes):
    leftover = episodes.with_name("train.partial")
    leftover.mkdir()
    (leftover / "junk").write_text("x")
    with replacing(episodes) as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in episodes.iterdir()] == ["new"]


def test_what_one_process_fills_another_leaves_alone(episodes):
    with replacing(episodes) as partial:
        (partial / "first").write_text("x")
        with pytest.raises(StageError, match="another process is doing this already"), replacing(episodes):
            pass
    assert [path.name for path in episodes.iterdir()] == ["first"]


def test_disk_full_while_writing(episodes):
    with (
        pytest.raises(StageError, match="No room to write in .*No space left"),
        replacing(episodes) as partial,
    ):
        (partial / "shard-00001.arrow").symlink_to("/dev/full")
        write_shards(make_rows(100), partial, 50_000)
    assert open_episodes(episodes).num_rows == 100


def test_too_little_space_is_told_before_writing(tmp_path):
    with pytest.raises(StageError, match=r"about 1,000,000,000,000\.0 MB are needed and [\d,.]+ MB are free"):
        check_free_space(tmp_path, 10**18)
    check_free_space(tmp_path, 1000)
