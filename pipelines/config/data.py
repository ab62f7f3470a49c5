"""The data section, and its entries: one class per kind of source.

Paths are relative to the folder the command runs in; files may be compressed with gzip. ``configs/data`` has one file
per source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pipelines.config.types import Count, Name, Number, Section, Share


class Generated(Section):
    """Papers made up for the run, about facts that nothing but having read them tells (source: generated)."""

    train_papers: Count = Field(96, description="papers to train on")
    eval_papers: Count = Field(24, description="papers to evaluate on; they don't change with train_papers")
    facts_per_paper: Count | Annotated[list[Count], Field(min_length=1)] = Field(
        6,
        description="facts in a paper, each with its question, and one question more; of several numbers the papers "
        "have them in turns",
    )
    seed: int = Field(0, description="of the facts drawn")


class _Source(Section):
    weight: Number = Field(
        1.0, ge=0, description="how often training draws from this source, relative to the weights of the others"
    )
    start: Share = Field(0.0, description="share of the training's steps after which it draws from this source")
    stop: Share = Field(1.0, description="share of the training's steps from which on it no longer does")
    system_prompt: str | None = Field(
        None, description="system message before what is written and before what is read; null: none"
    )

    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> Self:
        if self.start >= self.stop:
            raise ValueError(f"start {self.start:g} isn't before stop {self.stop:g}: no step draws from this source")
        return self


class _FileSource(_Source):
    eval_files: list[str] = Field(
        default_factory=list, description="files to evaluate on; none: eval_share is held out from the training files"
    )
    eval_share: Number = Field(
        0.05, gt=0, lt=1, description="share of the training records that is held out where there are no eval_files"
    )


class _TextSource(_FileSource):
    gaps: Annotated[int, Field(ge=0)] = Field(
        0,
        description='questions more about each training text, at most: "Fill in the blank: …", with a name, a number '
        "or a long word of it left out",
    )


class QasperSource(_FileSource):
    """Papers in QASPER's official form: their text is written, their questions are asked one by one."""

    kind: Literal["qasper"]
    train_files: list[str] = Field(default_factory=list, description="QASPER JSON files; none: the Hub's data set")
    hub_id: str = Field("allenai/qasper", description="data set on the Hub, where there are no train_files")
    hub_revision: str | None = Field(None, description="its branch, tag or commit; null: its Parquet conversion")
    form: Literal["sections", "release"] = Field(
        "sections",
        description="how a paper is written: a message a section, or as in the training set of δ-mem's public release "
        "one message of numbered turns after a system message, which the questions have too",
    )

    @model_serializer(mode="wrap")
    def _without_the_usual_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # entries without this key keep the hashes they had before there was one
        return {key: value for key, value in handler(self).items() if (key, value) != ("form", "sections")}


class SquadSource(_TextSource):
    """Passages in SQuAD's form, version 1.1 or 2.0: a passage or a part of it is written, and asked about."""

    kind: Literal["squad"]
    train_files: list[str] = Field(min_length=1, description="JSON files in SQuAD's form")
    write: Literal["passage", "window", "sentence"] = Field(
        "passage",
        description="what is written: the whole passage, the run of two or three sentences that holds the answer, or "
        "that sentence alone; questions about the same text share one write",
    )
    texts: Literal["asked", "others"] = Field(
        "asked",
        description="which texts: those that questions are asked about, or the others, which only gaps are asked about",
    )

    @model_validator(mode="after")
    def _others_have_gaps(self) -> SquadSource:
        if self.texts == "others" and not self.gaps:
            raise ValueError("texts: others have no questions of their own; give gaps, how many to ask about each")
        return self


class ChatSource(_FileSource):
    """Chats: earlier messages are written, the last ones stay visible, and the assistant's replies are learnt.

    A record has ``messages`` (each with role and content) or ``prompt`` and ``response``. Its own system message takes
    the place of ``system_prompt``.
    """

    kind: Literal["chat"]
    train_files: list[str] = Field(
        default_factory=list, description="JSON (one array), JSON lines or Parquet files; none: the Hub's data set"
    )
    hub_id: str | None = Field(None, description="data set on the Hub, where there are no train_files")
    hub_revision: str | None = Field(None, description="its branch, tag or commit")
    hub_split: str = Field("train", description="its split to train on")
    hub_eval_split: str | None = Field(None, description="its split to evaluate on; null: eval_share is held out")
    supervise: Literal["last", "every"] = Field(
        "last", description="which replies of the assistant are learnt: a chat's last, or every one with its own write"
    )
    visible: Count = Field(1, description="messages before a reply that stay in the prompt")
    write: Literal["earlier", "all"] = Field(
        "earlier",
        description="what is written: the messages before the visible ones (replies without any are dropped, unless "
        "first_replies), or all before the reply, so that the visible ones are written too",
    )
    first_replies: bool = Field(
        False,
        description="whether replies before which nothing is written are learnt too, such as a chat's first, from an "
        "empty memory; that reads as nothing, so they teach only tsw and msw, and with train.write_questions",
    )

    @model_validator(mode="after")
    def _from_somewhere(self) -> ChatSource:
        if not self.train_files and self.hub_id is None:
            raise ValueError("give train_files, or the hub_id of a data set on the Hub")
        return self


class TweetqaSource(_TextSource):
    """Tweets in TweetQA's form: a tweet is written, its questions are answered in free text."""

    kind: Literal["tweetqa"]
    train_files: list[str] = Field(min_length=1, description="TweetQA's JSON files")


class GeneratedSource(_Source, Generated):
    """Invented facts, told in papers or in conversations, and questions for single facts."""

    kind: Literal["generated"]
    told: Literal["paper", "conversation", "text"] = Field(
        "paper",
        description="how the facts are told: in a paper's sections, by a user between other remarks, or one after the "
        "other as one text, without a question more",
    )


class ConversationsSource(_Source):
    """Conversations made up for the run: a person tells facts among small talk, and asks for them in other words."""

    kind: Literal["conversations"]
    train_conversations: Count = Field(4000, description="conversations to train on")
    eval_conversations: Count = Field(200, description="conversations to evaluate on, with values and phrasings kept")
    max_facts: Count = Field(6, description="facts told in a conversation: from one to so many, each with its question")
    unknown_share: Number = Field(
        0.2, ge=0, le=1, description="in what share of the conversations something is asked that wasn't told"
    )
    reply_share: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="in what share of them the reply to a turn that tells something is learnt too",
    )
    new_values: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the values told in training that stand in no list, but look like one of it",
    )
    word_files: list[str] = Field(
        default_factory=list,
        description="JSON files in SQuAD's form whose answers new values are drawn from, besides made-up words",
    )
    value_weight: Number = Field(
        1.0,
        gt=0,
        description='in the loss of an answer that says what was told ("Your dog is called Rex.") the value\'s tokens '
        "count so many times as the others': what frames it is learnt soon, or drawn among several. 3, measured "
        "together with other changes, is in run 12 of docs/remember.md; held-out answers are weighed evenly",
    )
    seed: int = Field(0, description="of what is drawn")


class AskedFile(Section):
    """A file of what people say to a model."""

    file: str = Field(description="the file as its authors publish it")
    form: Literal["chat", "lines", "banking77", "clinc150", "trec", "tweetqa"] = Field(
        "chat",
        description="what it is: chats in the form of kind chat, of which the user's messages are taken; a text on "
        "every line; the CSV of Banking77, the JSON of CLINC150 (its training texts), the labelled questions of TREC, "
        "the tweets of TweetQA",
    )


class RepliesSource(_Source):
    """Ordinary turns with the frozen backbone's own replies as targets: after a conversation, or as a chat begins.

    The stage ``replies`` asks for them, and leaves chats that the kind ``chat`` reads, one by one.
    """

    kind: Literal["replies"]
    asked: Annotated[list[AskedFile], Field(min_length=1)] = Field(description="what the backbone is asked")
    train_prompts: Count = Field(8000, description="what is asked for training: so many of the files' texts, drawn")
    eval_prompts: Count = Field(200, description="others for evaluation; they don't change with train_prompts")
    max_new_tokens: Count = Field(
        96,
        description="longest reply; of what the backbone doesn't finish within it the beginning is learnt, and no end",
    )
    max_facts: Count = Field(
        6, description="facts told in the conversation that is written before, one of the kind conversations"
    )
    first_share: Share = Field(
        0.0,
        description="share of the chats in which nothing comes before what is asked, as when a chat begins: with other "
        "episodes alone training shows no empty memory, from which replies then cost most (docs/remember.md); like a "
        "chat's first_replies it needs train.write_questions",
    )
    seed: int = Field(0, description="of what is drawn")

    def as_chat(self, folder: Path) -> ChatSource:
        """The chats that the stage left in a folder, as a source."""
        files = {f"{split}_files": [str(folder / f"{split}.jsonl")] for split in ("train", "eval")}
        common = self.model_dump(include=set(_Source.model_fields))
        return ChatSource.model_validate({"kind": "chat", **common, **files, "first_replies": self.first_share > 0})


DataSource = Annotated[
    QasperSource | SquadSource | ChatSource | TweetqaSource | GeneratedSource | ConversationsSource | RepliesSource,
    Field(discriminator="kind"),
]

_LEGACY_KEYS = {
    "generated": {"generated"},
    "files": {"train_files", "eval_files"},
    "hub": {"hub_id", "hub_revision"},
}


class Data(Section):
    """What adapters are trained on, and what the benchmarks ``qasper`` and ``held_out`` ask about.

    Either ``sources``, any number of them with their weights, or one ``source`` of papers.
    """

    sources: dict[Name, DataSource] = Field(
        default_factory=dict, description="what to train on: names of files in configs/data, or entries with a kind"
    )
    steps: Literal["mixed", "homogeneous"] = Field(
        "mixed", description="whether an optimiser step draws from all sources or, texts of similar lengths, from one"
    )
    source: Literal["generated", "files", "hub"] | None = Field(
        None, description="where the papers come from, instead of sources"
    )
    train_files: list[str] = Field(default_factory=list, description="QASPER JSON files (source: files)")
    eval_files: list[str] = Field(default_factory=list, description="QASPER JSON files (source: files)")
    hub_id: str = Field("allenai/qasper", description="data set on the Hub (source: hub)")
    hub_revision: str | None = Field(None, description="its branch, tag or commit; null: its Parquet conversion")
    generated: Generated = Field(default_factory=Generated, description="how papers are made (source: generated)")
    max_written_tokens: Count = Field(8192, description="tokens of a paper that go into the memory")
    max_read_tokens: Count = Field(
        512, description="tokens of a question with its answer; a longer one is dropped and named in the manifest"
    )
    max_train_questions: Count | None = Field(
        None, description="only the first so many questions (of each source); null: all"
    )
    max_eval_questions: Count | None = Field(
        None, description="only the first so many questions (of each source); null: all"
    )
    overlong: Literal["drop", "truncate"] = Field("drop", description="papers longer than max_written_tokens")
    shard_megabytes: Count = Field(64, description="size of a file of tokenised episodes")
    processes: Count = Field(2, description="processes that tokenise; the episodes are the same for any number")

    @model_validator(mode="after")
    def _one_way_to_name_them(self) -> Data:
        if self.sources and self.source:
            raise ValueError("give sources or source, not both")
        if not (self.sources or self.source):
            raise ValueError("give sources (names of files in configs/data), or source: generated, files or hub")
        if self.source == "files" and not (self.train_files and self.eval_files):
            raise ValueError("source 'files' needs train_files and eval_files")
        if self.sources and not sum(source.weight for source in self.sources.values()):
            raise ValueError(f"the weights of {', '.join(self.sources)} sum to 0; give at least one source a weight")
        if self.sources:
            for place in {0.0, *(source.stop for source in self.sources.values() if source.stop < 1)}:
                if not any(s.weight and s.start <= place < s.stop for s in self.sources.values()):
                    raise ValueError(f"no source with a weight is drawn from at {place:g} of the steps (start, stop)")
        return self

    @property
    def named_sources(self) -> dict[str, DataSource]:
        """Every source by name; a single ``source`` of papers is the source of its kind."""
        if self.source == "generated":
            return {"generated": GeneratedSource(kind="generated", **self.generated.model_dump())}
        if self.source:
            keys = _LEGACY_KEYS[self.source]
            return {"qasper": QasperSource(kind="qasper", **self.model_dump(include=keys))}
        return self.sources

    @property
    def files(self) -> list[str]:
        """The files that the sources are read from."""
        sources = self.named_sources.values()
        read = [path for s in sources for path in (*getattr(s, "train_files", ()), *getattr(s, "eval_files", ()))]
        return read + [asked.file for source in self.replies.values() for asked in source.asked]

    @property
    def replies(self) -> dict[str, RepliesSource]:
        """The sources whose replies the backbone gives, by name."""
        return {name: source for name, source in self.sources.items() if isinstance(source, RepliesSource)}

    @property
    def weights(self) -> dict[str, float]:
        """Of every entry of ``sources``."""
        return {name: source.weight for name, source in self.sources.items()}

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """[start, stop) of every entry of ``sources``, as shares of the steps."""
        return {name: (source.start, source.stop) for name, source in self.sources.items()}

    @property
    def unused_keys(self) -> set[str]:
        """Keys that say nothing about the episodes, because the sources are named another way."""
        legacy = set().union(*(keys for source, keys in _LEGACY_KEYS.items() if source != self.source))
        return legacy | ({"sources", "steps"} if self.source else {"source"})
