"""Reading data files: gzip or not, whole or damaged, and what JSON lets through that nothing else takes."""

import gzip
import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.files import Distinct, contents, json_members, mended, parse_json_lines, read_json
from pipelines.errors import StageError


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_gzip_is_known_by_its_content_and_not_by_its_name(write):
    value = {"a": ["é", 1]}
    text = json.dumps(value).encode()
    assert read_json(write(text), "x") == read_json(write(gzip.compress(text)), "x") == value
    assert read_json(write(b"\xef\xbb\xbf" + text), "x") == value  # with a byte order mark


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            gzip.compress(b"[1, 2]", mtime=0)[:-9],
            r"can't be read \(the gzip file is cut off; fetch it again\); expected",
        ),
        (b"\x1f\x8b" + b"nonsense" * 9, "data.json: can't be read"),
        (b"[1, 2", r"line 1, column 6: not JSON .*cut off; fetch it again"),
        (b"[1,\n 2}", r"line 2, column 3: not JSON .*expected numbers"),
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice in one object"),
        (b"[\xff]", "byte 1: not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids="gzip-cut gzip-damaged cut wrong twice bytes deep".split(),
)
def test_a_damaged_file_is_named_with_its_fault(write, content, said):
    with pytest.raises(StageError, match=said) as caught:
        read_json(write(content), "expected numbers")
    assert "data.json" in str(caught.value)


def test_a_damaged_gzip_is_an_error_of_the_file(write):
    packed = bytearray(gzip.compress(b"[1, 2, 3]" * 100))
    packed[20] ^= 0xFF
    with pytest.raises(OSError):
        contents(write(bytes(packed)))


def members(path):
    return list(json_members(path, "expected an object"))


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists)),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
def test_members_of_an_object_are_read_one_by_one(tmp_path_factory, value, piece, indent):
    path = tmp_path_factory.mktemp("members") / "data.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    with mock.patch("pipelines.data.files._PIECE", piece):
        assert members(path) == list(value.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b'{"a": 1, "b": 2}', mtime=0)[:-9], "the gzip file is cut off"),
        (b'{"a": 1, "b": [1, 2', r"line 1, column 20: not JSON .*cut off"),
        (b'{"a": 1, "b": [1,, 2]}', r"line 1, column 18: not JSON .*expected an object"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1 "b": 2}', "not JSON"),
        (b'{"a": 1} {}', "not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice in one object"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' appears twice in one object"),
        (b'{"a": "\xff"}', "byte 7: not UTF-8 text"),
        (b"[1, 2]", "line 1: the file holds an array at its top; expected an object"),
        (b"", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_where_one_of_them_is_damaged_is_said_as_of_a_whole_file(write, content, said):
    with pytest.raises(StageError, match=said):
        members(write(content))


def test_of_lines_only_the_damaged_are_lost():
    found = dict(parse_json_lines(['{"a": 1}\n', "\n", '{"a": \n', '{"b": 1, "b": 2}\n', "[2]\n"]))
    assert found[1] == {"a": 1} and found[5] == [2] and sorted(found) == [1, 3, 4, 5]
    assert "not JSON" in str(found[3]) and "appears twice" in str(found[4])


def test_lone_surrogates_are_replaced_and_counted():
    value = json.loads(r'{"a\\ud83d": ["x\\ude00y", {"b": "\\ud83d\\ude00"}, 3, null]}'.replace("\\\\", "\\"))
    assert mended(value) == ({"a\ufffd": ["x\ufffdy", {"b": "😀"}, 3, None]}, 2)
    assert mended({"a": [1, "b"]}) == ({"a": [1, "b"]}, 0)


def test_repeated_names_get_the_first_free_number():
    assert list(map(Distinct(), ["q", "q", "q-2", "q", "r"])) == ["q", "q-2", "q-2-2", "q-3", "r"]
