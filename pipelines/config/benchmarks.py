"""The benchmark entries of a configuration: one class per kind.

Paths are relative to the folder the command runs in. ``configs/benchmarks`` has one file per benchmark.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from pipelines.config.types import Count, Name, Section, unique

Version = Annotated[Count, Field(description="to be raised when its questions, prompts or scores change")]


class QasperSettings(Section):
    """Questions about papers, from the evaluation episodes of the data section."""

    kind: Literal["qasper"]
    version: Version


class HeldOutSettings(Section):
    """What the sources of the data section hold out for evaluation: the replies that training would learn."""

    kind: Literal["held_out"]
    version: Count = Field(description="goes into the results; raise it where the questions or their scores change")
    max_new_tokens: Count = Field(64, description="longest answer that is generated")


class _Sampled(Section):
    version: Version
    max_contexts: Count | None = Field(None, description="only the first so many contexts; null is all")
    max_questions: Count | None = Field(None, description="only the first so many questions of each context")


class _Published(Section):
    """A benchmark of the paper's table: asked as its authors ask it, or as δ-mem's public release does."""

    drawn_by_release: ClassVar[bool] = False

    protocol: Literal["official", "release"] = Field(
        "official", description="whose way of asking and scoring: its authors', or that of the public release of δ-mem"
    )
    sampled: bool | None = Field(
        None,
        description="whether answers are drawn (temperature 0.4, top-p 0.9, top-k 10) or greedy; null: as the protocol "
        "has it, of which only the release's, and only for LoCoMo, draws them",
    )

    @property
    def draws(self) -> bool:
        """Whether answers are drawn."""
        return self.protocol == "release" and self.drawn_by_release if self.sampled is None else self.sampled

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # entries without these keys keep the hashes they had before there were any
        whole, unset = handler(self), {"protocol": "official", "sampled": None}
        return {key: value for key, value in whole.items() if key not in unset or value != unset[key]}


class LocomoSettings(_Sampled, _Published):
    """LoCoMo: questions about long conversations of many dated sessions."""

    drawn_by_release: ClassVar[bool] = True

    kind: Literal["locomo"]
    file: str = Field(description="locomo10.json, as its authors publish it")
    categories: Annotated[list[Annotated[int, Field(ge=1, le=5)]], Field(min_length=1), AfterValidator(unique)] = Field(
        [1, 2, 3, 4],
        description="kinds of questions: 1 several sessions, 2 time, 3 common knowledge, 4 one session, 5 unanswerable",
    )
    message: Literal["session", "turn"] = Field("session", description="what one message of the history is")


class HotpotqaSettings(_Sampled, _Published):
    """HotpotQA, development set, distractor setting: every question has its own ten paragraphs."""

    kind: Literal["hotpotqa"]
    file: str | None = Field(None, description="hotpot_dev_distractor_v1.json; null reads the Hub's copy")
    hub_id: str = Field("hotpotqa/hotpot_qa", description="data set on the Hub")
    hub_revision: str | None = Field(None, description="its branch, tag or commit")


class MemoryAgentBenchSettings(_Sampled, _Published):
    """MemoryAgentBench: many questions about each of its long contexts, in four competencies."""

    kind: Literal["memory_agent_bench"]
    folder: str | None = Field(None, description="folder with the four Parquet files; null reads the Hub")
    hub_id: str = Field("ai-hyz/MemoryAgentBench", description="data set on the Hub")
    hub_revision: str | None = Field(None, description="its branch, tag or commit")
    competencies: Annotated[list[Literal["AR", "TTL", "LRU", "CR"]], Field(min_length=1), AfterValidator(unique)] = (
        Field(
            ["AR", "TTL", "LRU", "CR"],
            description="accurate retrieval, test-time learning, long-range understanding, conflict resolution",
        )
    )
    sources: list[str] | None = Field(None, description="only these, by their names in the data; null is all")
    entities: str | None = Field(
        None, description="entity2id.json, the movie names that the source recsys_redial_full needs"
    )
    chunk_characters: Count = Field(16_384, description="longest message of the history")


class TtlSettings(Section):
    """A classification task of MemoryAgentBench's test-time learning, rebuilt from its own source."""

    kind: Literal["test_time_learning"]
    version: Version
    dataset: Literal["banking77", "clinc150", "trec_coarse", "trec_fine"] = Field(description="what is classified")
    train_file: str = Field(description="labelled examples, the data set's original file")
    test_file: str | None = Field(None, description="null: train_file holds the questions too (clinc150)")
    contexts: Count = Field(5, description="contexts, each with its own examples and numbers for the labels")
    shots: Count = Field(description="examples in a context, as many of each label as of another")
    questions: Count = Field(20, description="questions about each context")
    seed: int = Field(42, description="of the examples and numbers drawn")
    chunk_characters: Count = Field(16_384, description="longest message of the history")


class FactsSettings(Section):
    """Generated papers of few facts and of many, and questions for single facts."""

    kind: Literal["facts"]
    version: Version
    facts: Annotated[list[Count], Field(min_length=1), AfterValidator(unique)] = Field(
        [1, 2, 4, 8, 16, 32], description="numbers of facts in a paper"
    )
    papers: Count = Field(64, description="papers of each number")
    questions: Count = Field(4, description="questions about each paper, at most")
    seed: int = Field(42, description="of the papers and questions drawn")


class ChatRecallSettings(Section):
    """Facts that a person tells in a chat, asked for in other words once the turns have left the window."""

    kind: Literal["chat_recall"]
    version: Version
    facts: Annotated[list[Count], Field(min_length=1), AfterValidator(unique)] = Field(
        [1, 2, 4], description="numbers of facts told in a conversation"
    )
    turns_after: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(unique)] = Field(
        [0, 2, 4, 8], description="numbers of ordinary turns between the last fact and the question"
    )
    conversations: Count = Field(32, description="conversations of each number of facts; every fact is asked for")
    unseen: bool = Field(
        False,
        description="facts of kinds that no training sees (a blood type, a seat), instead of those that it does",
    )
    seed: int = Field(42, description="of the conversations drawn")


class ChatRepliesSettings(Section):
    """Ordinary requests after a chat: how likely the frozen backbone's own replies stay."""

    kind: Literal["chat_replies"]
    version: Version
    conversations: Count = Field(32, description="conversations that fill the memory")
    requests: Count = Field(4, description="requests after each")
    max_new_tokens: Count = Field(128, description="longest reply; of a longer one the beginning is asked for")
    seed: int = Field(42, description="of the conversations and requests drawn")


class LmEvalSettings(_Published):
    """A task of lm-evaluation-harness. It has no history: the prompt is read, and written as it is read."""

    kind: Literal["lm_eval"]
    version: Version
    task: Name = Field(description="the task's name in the harness")
    data_file: str | None = Field(None, description="the data as JSON, JSON lines or CSV; null reads the Hub")
    metrics: Annotated[list[str], Field(min_length=1), AfterValidator(unique)] = Field(
        description="METRIC or METRIC,FILTER as the harness names them; the first is the headline"
    )
    max_new_tokens: Count | None = Field(None, description="null is the task's own")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="null is the task's own")
    max_questions: Count | None = Field(None, description="only the first so many questions; null is all")


BenchmarkSettings = Annotated[
    QasperSettings
    | HeldOutSettings
    | LocomoSettings
    | HotpotqaSettings
    | MemoryAgentBenchSettings
    | TtlSettings
    | FactsSettings
    | ChatRecallSettings
    | ChatRepliesSettings
    | LmEvalSettings,
    Field(discriminator="kind"),
]

OF_EPISODES = ("qasper", "held_out")
"""Kinds that ask the evaluation episodes of the data section."""
