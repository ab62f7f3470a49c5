"""Reading data files: gzip or not, whole or damaged, and what JSON lets through that nothing else takes."""

import gzip
import json

import pytest

from pipelines.data.files import contents, distinct, mended, parse_json_lines, read_json
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
            gzip.compress(b"[1, 2]")[:-9],
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


def test_of_lines_only_the_damaged_are_lost():
    found = dict(parse_json_lines('{"a": 1}\n\n{"a": \n{"b": 1, "b": 2}\n[2]\n'))
    assert found[1] == {"a": 1} and found[5] == [2] and sorted(found) == [1, 3, 4, 5]
    assert "not JSON" in str(found[3]) and "appears twice" in str(found[4])


def test_lone_surrogates_are_replaced_and_counted():
    value = json.loads(r'{"a\\ud83d": ["x\\ude00y", {"b": "\\ud83d\\ude00"}, 3, null]}'.replace("\\\\", "\\"))
    assert mended(value) == ({"a\ufffd": ["x\ufffdy", {"b": "😀"}, 3, None]}, 2)
    assert mended({"a": [1, "b"]}) == ({"a": [1, "b"]}, 0)


def test_repeated_names_get_the_first_free_number():
    assert list(distinct(["q", "q", "q-2", "q", "r"])) == ["q", "q-2", "q-2-2", "q-3", "r"]
