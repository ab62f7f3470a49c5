"""Questions about scientific papers (Dasigi et al. 2021), from the evaluation episodes of the data section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.benchmarks.answer_f1 import answer_f1
from pipelines.benchmarks.base import Context, Question
from pipelines.config.benchmarks import HeldOutSettings, QasperSettings
from pipelines.data.documents import BadRecord
from pipelines.data.shards import open_episodes, whole_chat
from pipelines.errors import StageError


class Qasper:
    """A paper is a context, its sections are the messages of the history.

    Args:
        name: of the configuration's entry.
        episodes: folder that the preprocess stage wrote.
    """

    max_new_tokens = 64
    stop: tuple[str, ...] = ()
    metrics = ("f1",)
    drop_first = "oldest"
    writes_questions = False
    category = "answer_type"
    """Column of the episodes that holds a question's category."""

    def __init__(self, name: str, settings: QasperSettings | HeldOutSettings, episodes: Path):
        self.name, self.version, self.episodes = name, str(settings.version), episodes
        self.bad_records: list[BadRecord] = []  # the manifest of the episodes names them

    def contexts(self) -> Iterator[Context]:
        """One context per paper. Raises StageError where the episodes are missing, damaged or empty."""
        table = open_episodes(self.episodes)
        if not table.num_rows:
            raise StageError(
                f"{self.episodes}: no question is left to evaluate; its manifest says why they were dropped."
            )
        # the questions of a paper are neighbours, and the tokens, most of a row, aren't needed
        paper: dict[str, Any] = {}
        questions: list[Question] = []
        columns = ["paper_id", "question_id", "messages", "prompt", "references", self.category]
        for batch in table.select(columns).to_batches():
            for row in batch.to_pylist():
                if questions and row["paper_id"] != paper["paper_id"]:
                    yield _context(paper, questions)
                    questions = []
                paper = row
                questions.append(
                    Question(
                        question_id=row["question_id"],
                        cluster_id=row["paper_id"],
                        messages=row["prompt"],
                        references=row["references"],
                        category=row[self.category],
                    )
                )
        yield _context(paper, questions)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        """Answer F1 as QASPER's own evaluator defines it."""
        return {"f1": answer_f1(prediction, question.references)}


def _context(row: dict[str, Any], questions: list[Question]) -> Context:
    """What a row has written, as training writes it; a prompt has its system message and what is visible only once."""
    written = row["messages"]
    history = [message for message in whole_chat(row) if message["role"] != "system"]
    visible = sum(message["role"] != "system" for message in row["prompt"])
    history = history[: len(history) - visible]
    return Context(row["paper_id"], history, questions, None if history == written else written)
