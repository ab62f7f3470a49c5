"""Texts to repeat: the written text and the end of its turn, under the source's own system message."""

import pyarrow as pa
import pytest

from pipelines.backbones.random_weights import byte_tokenizer
from pipelines.data.shards import SCHEMA
from pipelines.training.repetition import Repetition


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_the_answer_is_what_was_written_and_its_end(system):
    tokenizer, said = byte_tokenizer(), [{"role": "user", "content": text} for text in ("One. Two.", " Three. ")]
    row = {name: [] for name in SCHEMA.names} | {
        "paper_id": "p", "question_id": "q", "question": "", "answer": "", "answer_type": "", "source": "",
        "messages": [*system, *said],
    }  # fmt: skip
    table = pa.Table.from_pylist([row], schema=SCHEMA)
    (read,) = Repetition(tokenizer).of(table, [0], [3])
    assert read.owner == 3
    end = tokenizer.eos_token
    assert tokenizer.decode(read.answer) == "One. Two.\n\nThree." + end
    asked = tokenizer.decode(read.asked)
    assert asked.count("Repeat the text.") == 1 and asked.count("Be brief.") == len(system) and "One" not in asked
