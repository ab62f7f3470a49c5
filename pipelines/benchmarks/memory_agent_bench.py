"""MemoryAgentBench: learning from a long context that is given once and asked about often (Hu et al. 2025).

Four competencies: accurate retrieval (AR), test-time learning (TTL), long-range understanding (LRU) and
conflict resolution (CR), one Parquet file each on the Hub. The context is cut into messages as the benchmark
cuts it into chunks, but at the ends of paragraphs and by characters: the benchmark counts 4,096 tokens of
GPT-4o-mini.

The protocol of δ-mem's public release gives each context as one message of at most 120,000 characters, asks every
source in the same words, and takes an answer as right that has a reference in it; movies and summaries are scored as
the benchmark does. Lengths of answers are its own under both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.benchmarks import release_scores
from pipelines.benchmarks.base import Context, Question, limit
from pipelines.benchmarks.mab_scores import all_parts, movie_names, recall_at_5, text_scores
from pipelines.benchmarks.mab_sources import RELEASE_QUERY, SYSTEM, Source, clip, source_named
from pipelines.benchmarks.records import AS_PUBLISHED, DOWNLOAD, attempt, reference, text, usable
from pipelines.config.benchmarks import MemoryAgentBenchSettings
from pipelines.data.chunks import cut_text
from pipelines.data.documents import BadRecord
from pipelines.data.files import from_hub, parquet_rows, read_json
from pipelines.errors import StageError

FILES = {
    "AR": "Accurate_Retrieval-00000-of-00001.parquet",
    "TTL": "Test_Time_Learning-00000-of-00001.parquet",
    "LRU": "Long_Range_Understanding-00000-of-00001.parquet",
    "CR": "Conflict_Resolution-00000-of-00001.parquet",
}
_COLUMNS = ["context", "questions", "answers", "metadata"]


class MemoryAgentBench:
    """The benchmark, over its four Parquet files.

    ``score`` is the measure of each question's source; its parts are reported beside it where they apply. A
    question's category is its competency and source, such as ``TTL/icl_banking77_5900shot_balance``.
    """

    max_new_tokens = 50
    stop: tuple[str, ...] = ()
    metrics = ("score", "substring_exact_match", "exact_match", "f1", "recall_at_5")
    drop_first = "oldest"
    writes_questions = False

    def __init__(self, name: str, settings: MemoryAgentBenchSettings) -> None:
        self.name, self.version, self.settings = name, str(settings.version), settings
        self.bad_records: list[BadRecord] = []
        self._movies: dict[int, str] | None = None

    def contexts(self) -> Iterator[Context]:
        return limit(self._contexts(), self.settings.max_contexts, self.settings.max_questions)

    def _contexts(self) -> Iterator[Context]:
        self.bad_records.clear()
        for competency in self.settings.competencies:
            path = self._file(FILES[competency])
            rows = parquet_rows(path, "a Parquet file of MemoryAgentBench", _COLUMNS)
            make = partial(self._context, competency, path)
            yield from usable(rows, make, f"{path}, row", "a row of MemoryAgentBench", self.bad_records)

    def _context(self, competency: str, path: Path, number: int, row: Mapping[str, Any]) -> Context | None:
        name, context_id = text(row["metadata"]["source"], "source"), f"{competency}/{number}"
        if self.settings.sources is not None and name not in self.settings.sources:
            return None
        source, category = source_named(name, f"{path}, row {number}"), f"{competency}/{name}"
        if source.metric == "recall_at_5":
            self._movie_names(name)
        release = self.settings.protocol == "release"
        questions = []
        for index, pair in enumerate(zip(row["questions"], row["answers"], strict=True)):
            question_id = f"{context_id}/{index}"
            question = attempt(
                lambda question_id=question_id, pair=pair: _question(question_id, category, source, release, *pair),
                "question", context_id, "a question of MemoryAgentBench", self.bad_records, question_id,
            )  # fmt: skip
            questions += [question] if question else []
        if not questions:
            return None
        whole = text(row["context"], "context")
        longest = self.settings.chunk_characters
        parts = [clip(whole)] if release else [source.intro + chunk for chunk in cut_text(whole, longest)]
        return Context(context_id, [{"role": "user", "content": part} for part in parts], questions)

    def score(self, question: Question, prediction: str) -> dict[str, float]:
        metric = question.extra["metric"]
        if metric == "recall_at_5":
            recall = recall_at_5(prediction, question.references, self._movie_names(question.category))
            return {"score": recall, "recall_at_5": recall}
        scores = text_scores(prediction, question.references)
        if self.settings.protocol == "release":
            score = release_scores.best_f1 if metric == "f1" else release_scores.contains
            return {"score": score(prediction, question.references), **scores}
        if metric == "all_parts":
            return {"score": all_parts(prediction, question.references), **scores}
        return {"score": scores[metric], **scores}

    def _file(self, name: str) -> Path:
        if self.settings.folder is not None:
            found = Path(self.settings.folder) / name
            if not found.exists():
                raise StageError(
                    f"{found}: there is no such file. Put MemoryAgentBench's Parquet files there, or leave "
                    "competencies out."
                )
            return found
        from huggingface_hub import hf_hub_download

        hub_id, revision = self.settings.hub_id, self.settings.hub_revision
        return Path(
            from_hub(
                f"{hub_id}, data/{name}",
                "give the folder of its Parquet files as 'folder'",
                lambda: hf_hub_download(hub_id, f"data/{name}", repo_type="dataset", revision=revision),
            )
        )

    def _movie_names(self, where: str) -> dict[int, str]:
        if self._movies is None:
            path = self.settings.entities
            if path is None:
                raise StageError(
                    f"{where}: its answers are numbers of movies. Give the path of the benchmark's entity2id.json "
                    "as 'entities', or leave the source out with 'sources'."
                )
            entities = read_json(path, DOWNLOAD)
            if not isinstance(entities, dict) or not all(isinstance(number, int) for number in entities.values()):
                raise StageError(f"{path}: not MemoryAgentBench's {{address: number}} of movies. {AS_PUBLISHED}")
            self._movies = movie_names(entities)
        return self._movies


def _question(question_id: str, category: str, source: Source, release: bool, asked: Any, answers: Any) -> Question:
    if not isinstance(answers, list) or not answers:
        raise ValueError("it has no list of answers")
    asks = text(asked, "question")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": source.ask(asks)}]
    return Question(
        question_id=question_id,
        cluster_id=question_id.rpartition("/")[0],
        messages=[{"role": "user", "content": RELEASE_QUERY.format(asks.strip())}] if release else messages,
        references=[reference(answer) for answer in answers],
        category=category,
        extra={"metric": source.metric},
        max_new_tokens=source.max_new_tokens,
        asked=asked,
    )
