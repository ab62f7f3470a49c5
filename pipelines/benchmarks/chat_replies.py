"""What a memory costs a chat: how likely the frozen backbone's own replies to ordinary requests stay.

Requests of the held-out split are read after conversations of it (:mod:`pipelines.data.conversations`) have left the
window, and written as they are read. The reference is what the frozen backbone itself replies to the request, so that
its NLL under ``none`` (an empty memory) and ``state`` (a filled one) minus that under ``strength_0`` (the frozen
backbone) is what the adapter costs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pipelines.benchmarks.answer_f1 import answer_f1
from pipelines.benchmarks.base import Context, Question
from pipelines.config.benchmarks import ChatRepliesSettings
from pipelines.data.conversations import conversations, ordinary_turns
from pipelines.data.documents import BadRecord
from pipelines.data.draw import shuffled


class ChatReplies:
    """One context per conversation, with requests that don't occur in it; scored by answer F1 with the own reply."""

    stop: tuple[str, ...] = ()
    metrics = ("f1",)
    drop_first = "oldest"
    writes_questions = True

    def __init__(self, name: str, settings: ChatRepliesSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.max_new_tokens = settings.max_new_tokens
        self.bad_records: list[BadRecord] = []

    def contexts(self) -> Iterator[Context]:
        settings = self.settings
        for number, told in enumerate(conversations(settings.conversations, settings.seed, "eval")):
            rng = random.Random(f"{settings.seed}/{number}/requests")
            said = {message["content"] for message in told["messages"]}
            requests = [request for request, _ in ordinary_turns("eval") if request not in said]
            questions = [
                Question(f"{number}/{place}", str(number), [{"role": "user", "content": request}], references=[])
                for place, request in enumerate(shuffled(rng, requests)[: settings.requests])
            ]
            yield Context(str(number), told["messages"], questions)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        return {"f1": answer_f1(prediction, question.references)}
