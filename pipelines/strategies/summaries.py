"""Summaries by the backbone itself, for MemoryBank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from deltamem.chat.format import encode_messages
from deltamem.chat.messages import EncodedMessages
from pipelines.evaluation.passes import Reader
from pipelines.evaluation.prompts import PromptEncoder

REQUEST = "Summarize the events and key information in the content above in a few sentences."


@dataclass(frozen=True)
class Summaries:
    """Has a model summarise texts, greedily.

    Attributes:
        batch_size: texts in a pass.
    """

    reader: Reader
    encoder: PromptEncoder
    batch_size: int

    def __call__(self, texts: Sequence[str], limit: int) -> list[str]:
        """A summary of each text in at most ``limit`` tokens; a text longer than the window loses its end."""
        prompts = [self._prompt(text, limit) for text in texts]
        order = sorted(range(len(texts)), key=lambda number: len(prompts[number].input_ids))
        written = [""] * len(texts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            body = [EncodedMessages(*(tokens[:-1] for tokens in prompts[number])) for number in batch]
            last = [prompts[number].input_ids[-1] for number in batch]
            rows = self.reader.read(self.reader.start(len(batch)), body, write=False)
            answers = self.reader.generate(rows, last, [limit] * len(batch), write=False)
            for number, answer in zip(batch, answers, strict=True):
                written[number] = cast(str, self.encoder.tokenizer.decode(answer, skip_special_tokens=True))
        return written

    def _prompt(self, text: str, limit: int) -> EncodedMessages:
        while True:
            request = {"role": "user", "content": f"{text}\n\n{REQUEST}"}
            encoded = encode_messages(self.encoder.tokenizer, [request], add_generation_prompt=True, segment=None)
            if len(encoded.input_ids) + limit <= self.encoder.window or not text:
                return encoded
            text = text[: len(text) // 2]
