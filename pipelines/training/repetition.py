"""Texts to repeat: a prompt that asks for all of what was written, and that as its answer."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from deltamem.chat.format import encode_messages, encode_reply
from pipelines.data.shards import read_rows
from pipelines.training.batches import Read

PROMPT = "Repeat the text."


class Repetition:
    """Makes the prompts, each once: over several epochs the same texts come back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._made: dict[str, tuple[list[int], list[int]]] = {}

    def of(self, episodes: pa.Table, rows: Sequence[int], owners: Sequence[int]) -> list[Read]:
        """The prompts for the texts of some rows, under the rows of the memory that hold them."""
        papers = read_rows(episodes, rows, ["paper_id"])
        return [
            Read(*self._encoded(episodes, row, paper["paper_id"]), owner)
            for row, paper, owner in zip(rows, papers, owners, strict=True)
        ]

    def _encoded(self, episodes: pa.Table, row: int, paper: str) -> tuple[list[int], list[int]]:
        if paper not in self._made:
            (found,) = read_rows(episodes, [row], ["messages"])
            system = [message for message in found["messages"] if message["role"] == "system"]
            text = "\n\n".join(m["content"].strip() for m in found["messages"] if m["role"] != "system")
            prompt = [*system, {"role": "user", "content": PROMPT}]
            asked = encode_messages(self.tokenizer, prompt, add_generation_prompt=True, segment=None).input_ids
            self._made[paper] = asked, encode_reply(self.tokenizer, prompt, text)
        return self._made[paper]
