"""From a context and its questions to the tokens that each condition reads and writes."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Literal

from transformers import PreTrainedTokenizerBase

from deltamem.chat.format import encode_messages, encode_reply
from deltamem.chat.messages import EncodedMessages, Message
from deltamem.config import SegmentRule
from deltamem.errors import DeltaMemError
from pipelines.benchmarks.base import Context, Question, prompt_messages
from pipelines.errors import StageError

Side = Literal["oldest", "newest"]

# A question nobody asks. Where its prompt and a real one part is where the shared beginning of the prompts
# ends, so that it is the same whether a context has one question or a hundred.
_PROBE: Message = {"role": "user", "content": "\u2026"}


@dataclass(frozen=True)
class FullPrompts:
    """The prompts of the condition ``full`` for all questions of a context, in their order.

    ``beginning`` + a tail are the tokens of one conversation through the chat template.

    Attributes:
        beginning: the tokens they share: as much of the history as fits the window.
        tails: the rest of each prompt, at least one token.
        left_out: the messages of the history that don't fit.
    """

    beginning: EncodedMessages
    tails: list[EncodedMessages]
    left_out: list[Message]


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes with a backbone's chat template.

    Attributes:
        segment: what a segment of the sequence-state write is; None where nothing is written by segment.
        window: how many tokens the backbone can attend to.
        write_tokens: how many tokens of a history are written in one pass, at most; None: the window.
    """

    tokenizer: PreTrainedTokenizerBase
    segment: SegmentRule | None
    window: int
    write_tokens: int | None = None

    def history(self, messages: Sequence[Message]) -> list[EncodedMessages]:
        """What is written for a history: one piece, or several where it is longer than is written in one pass."""
        limit = min(self.window, self.write_tokens or self.window)
        return pieces(encode_messages(self.tokenizer, messages, segment=self.segment), limit)

    def question(self, question: Question) -> EncodedMessages:
        """The prompt of a question asked alone."""
        return self._prompt(question.messages)

    def answer(self, question: Question) -> list[int]:
        """The tokens of the first reference in an assistant message, with the one that ends the turn if it is finished.

        Raises:
            StageError: there are none.
        """
        try:
            return encode_reply(self.tokenizer, question.messages, question.references[0], question.finished)
        except DeltaMemError as error:
            raise StageError(
                f"Question {question.question_id}: how likely its first reference is can't be measured ({error})."
            ) from error

    def full(self, context: Context, room: int, drop_first: Side) -> FullPrompts:
        """The prompts of a context's questions, with as much of its history as fits.

        Args:
            room: tokens of the window to keep free for the answer.
            drop_first: the end of the history at which messages, and of a single one words, are left out.

        Raises:
            StageError: a question doesn't fit the window even without the history.
        """
        beginning, tails = self._shared(context.questions, context.history)
        lengths = [len(tail.input_ids) for tail in tails]
        left_out: list[Message] = []
        if len(beginning.input_ids) + max(lengths) + room > self.window:
            longest = context.questions[lengths.index(max(lengths))]
            kept, left_out = self.shorten(context.history, longest, room, drop_first)
            beginning, tails = self._shared(context.questions, kept)
        return FullPrompts(beginning, tails, left_out)

    def _shared(
        self, questions: Sequence[Question], history: Sequence[Message]
    ) -> tuple[EncodedMessages, list[EncodedMessages]]:
        """The shared beginning of the questions' prompts and their tails.

        A history is long and may have hundreds of questions: it is encoded once, with the first of them. The
        tails come from prompts with no more than its last turn, which end in the same tokens; should the first
        one not, because the template looks further back, every prompt is encoded whole.
        """
        turns = [number for number, message in enumerate(history) if message["role"] == "user"]
        _, tails = self._cut(questions, history[turns[-1] :] if turns else history)
        whole = self._prompt(prompt_messages(questions[0], history))
        begin = len(whole.input_ids) - len(tails[0].input_ids)
        if whole.input_ids[begin:] != tails[0].input_ids:
            return self._cut(questions, history)
        earlier = max(whole.segment_ids) - max(tails[0].segment_ids)
        return EncodedMessages(whole.input_ids[:begin], whole.segment_ids[:begin]), [
            EncodedMessages(tail.input_ids, [s + earlier if s >= 0 else s for s in tail.segment_ids]) for tail in tails
        ]

    def _cut(
        self, questions: Sequence[Question], history: Sequence[Message]
    ) -> tuple[EncodedMessages, list[EncodedMessages]]:
        prompts = [self._prompt(prompt_messages(question, history)) for question in questions]
        system = [message for message in questions[0].messages[:1] if message["role"] == "system"]
        probe = self._prompt([*system, *history, _PROBE])
        shared = len(commonprefix([prompt.input_ids for prompt in (*prompts, probe)]))
        shared = min(shared, *(len(prompt.input_ids) - 1 for prompt in prompts))
        # what a template puts before a question may belong to the question's segment, which is written in one pass
        while shared and any(-1 != p.segment_ids[shared] == p.segment_ids[shared - 1] for p in prompts):
            shared -= 1
        return (
            EncodedMessages(*(tokens[:shared] for tokens in prompts[0])),
            [EncodedMessages(*(tokens[shared:] for tokens in prompt)) for prompt in prompts],
        )

    def _prompt(self, messages: Sequence[Message]) -> EncodedMessages:
        return encode_messages(self.tokenizer, messages, add_generation_prompt=True, segment=self.segment)

    def shorten(
        self, history: list[Message], question: Question, room: int, drop_first: Side
    ) -> tuple[list[Message], list[Message]]:
        """The most messages of one end of a history that fit with the question, and the messages left out.

        Arguments and errors as in :meth:`full`; of a single message that doesn't fit, words are left out.
        """

        def fits(messages: list[Message]) -> bool:
            prompt = self._prompt(prompt_messages(question, messages))
            return len(prompt.input_ids) + room <= self.window

        if not fits([]):
            raise StageError(
                f"Question {question.question_id} and {room} tokens of answer are more than the window of "
                f"{self.window} tokens, even without the history. Set a larger window."
            )
        kept, left_out = _split(history, fits, drop_first)
        if kept:
            return kept, left_out
        # not even one message: its words, then
        last = left_out.pop() if drop_first == "oldest" else left_out.pop(0)

        def message(words: list[str]) -> list[Message]:
            return [{**last, "content": " ".join(words)}] if words else []

        words = last["content"].split(" ")
        kept_words, other_words = _split(words, lambda part: fits(message(part)), drop_first)
        cut = message(other_words)
        return message(kept_words), [*left_out, *cut] if drop_first == "oldest" else [*cut, *left_out]


def pieces(encoded: EncodedMessages, limit: int) -> list[EncodedMessages]:
    """Cuts tokens into pieces of at most ``limit``, where a segment begins if one does within the limit."""
    segments, cuts = encoded.segment_ids, [0]
    while len(segments) - cuts[-1] > limit:
        latest = cuts[-1] + limit
        begins = (i for i in range(latest, cuts[-1], -1) if -1 != segments[i] != segments[i - 1])
        cuts.append(next(begins, latest))
    return [
        EncodedMessages(encoded.input_ids[a:b], segments[a:b])
        for a, b in zip(cuts, [*cuts[1:], len(segments)], strict=True)
    ]


def _split(parts: list, fits: Callable[[list], bool], drop_first: Side) -> tuple[list, list]:
    """The longest end (or beginning) of ``parts`` that fits, and the rest."""

    def cut(dropped: int) -> tuple[list, list]:
        if drop_first == "oldest":
            return parts[dropped:], parts[:dropped]
        keep = len(parts) - dropped
        return parts[:keep], parts[keep:]

    return cut(bisect.bisect_left(range(len(parts)), True, key=lambda dropped: fits(cut(dropped)[0])))
