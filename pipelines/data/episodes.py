"""One episode per question: the paper is written into the memory, then the question is read and answered.

Every section of the paper is a message of its own, which makes the sections the segments of the
sequence-state write. The question is asked in a chat of its own, so that nothing of the paper is visible
while it is answered.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltamem.chat.format import encode_messages, encode_reply
from deltamem.chat.messages import Message
from deltamem.errors import DeltaMemError
from pipelines.data.papers import Paper, PaperQuestion
from pipelines.errors import StageError

NO_TEXT = "the paper has no text"
LONG_PAPER = "the paper is longer than max_written_tokens"
LONG_QUESTION = "question and answer are longer than max_read_tokens"


@dataclass
class PaperEpisodes:
    """Episodes of one paper as rows of ``pipelines.data.shards.SCHEMA``, and the ids of dropped questions by reason.

    ``truncated`` tells that the end of the paper was cut off to fit the budget.
    """

    paper_id: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    truncated: bool = False


@dataclass(frozen=True)
class EpisodeEncoder:
    """Turns papers into episodes with a backbone's chat template.

    max_written_tokens bounds the paper's tokens, max_read_tokens those of question and answer together. A
    longer paper is dropped or, with overlong="truncate", loses its last sections and, if one is left that
    is still too long, the last words of that.
    """

    tokenizer: PreTrainedTokenizerBase
    max_written_tokens: int
    max_read_tokens: int
    overlong: Literal["drop", "truncate"]

    def encode(self, paper: Paper) -> PaperEpisodes:
        """All episodes of a paper. Raises StageError if the chat template marks no end of an answer."""
        result = PaperEpisodes(paper.paper_id)
        ids = [question.question_id for question in paper.questions]
        messages = paper_messages(paper)
        if not messages:
            result.dropped[NO_TEXT] = ids
            return result
        context = encode_messages(self.tokenizer, messages)
        if len(context.input_ids) > self.max_written_tokens:
            messages = self._shorten(messages) if self.overlong == "truncate" else []
            if not messages:
                result.dropped[LONG_PAPER] = ids
                return result
            context = encode_messages(self.tokenizer, messages)
            result.truncated = True
        written = {
            "paper_id": paper.paper_id,
            "context_ids": np.array(context.input_ids, dtype=np.int32),
            "segment_ids": np.array(context.segment_ids, dtype=np.int32),
            "messages": messages,
        }
        for question in paper.questions:
            read = self._read_part(question)
            if len(read["question_ids"]) + len(read["answer_ids"]) > self.max_read_tokens:
                result.dropped.setdefault(LONG_QUESTION, []).append(question.question_id)
            else:
                result.rows.append(written | read)
        return result

    def _read_part(self, question: PaperQuestion) -> dict[str, Any]:
        # Where annotators disagree, the first usable answer in file order is the one to learn: that needs
        # no judgement and is the same everywhere. Scoring compares with all of them.
        answer = question.answers[0]
        ask = {"role": "user", "content": question.text}
        prompt = encode_messages(self.tokenizer, [ask], add_generation_prompt=True)
        try:
            reply = encode_reply(self.tokenizer, [ask], answer.text)
        except DeltaMemError as error:
            raise StageError(
                f"question {question.question_id}: its answer has no end to learn ({error}); give the backbone's "
                "tokenizer a chat template with an end-of-turn token"
            ) from error
        return {
            "question_id": question.question_id,
            "question": question.text,
            "question_ids": np.array(prompt.input_ids, dtype=np.int32),
            "answer": answer.text,
            "answer_ids": np.array(reply, dtype=np.int32),
            "answer_type": answer.kind,
            "references": [answer.text for answer in question.answers],
        }

    def _shorten(self, messages: list[Message]) -> list[Message]:
        """The longest beginning of a paper that fits; empty if not even one word does."""
        while len(messages) > 1 and not self._fits(messages):
            messages = messages[:-1]
        if self._fits(messages):
            return messages
        words = messages[0]["content"].split(" ")

        def beginning(count: int) -> list[Message]:
            return [{"role": "user", "content": " ".join(words[:count])}]

        longest = bisect.bisect_left(range(1, len(words)), True, key=lambda count: not self._fits(beginning(count)))
        return beginning(longest) if longest else []

    def _fits(self, messages: list[Message]) -> bool:
        return len(encode_messages(self.tokenizer, messages).input_ids) <= self.max_written_tokens


def paper_messages(paper: Paper) -> list[Message]:
    """The paper as user messages: title with abstract, then each section; what has no text is left out."""
    parts = [(paper.title, [paper.abstract])] if (paper.title + paper.abstract).strip() else []
    parts += [
        (section.name, section.paragraphs)
        for section in paper.sections
        if any(paragraph.strip() for paragraph in section.paragraphs)
    ]
    return [
        {"role": "user", "content": "\n".join(line.strip() for line in (head, *body) if line.strip())}
        for head, body in parts
    ]
