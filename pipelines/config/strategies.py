"""The strategy entries of a configuration: one class per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipelines.config.types import Count, Number, Section, unique


class _Untrained(Section):
    trained: ClassVar[bool] = False

    @property
    def train(self) -> dict[str, Any]:
        """Keys of the train section that differ here: none, there is no training."""
        return {}


class Bm25Strategy(_Untrained):
    """Retrieval: the passages of the history that share most words with the question."""

    kind: Literal["bm25"]
    top_k: Count = Field(5, description="passages in the prompt")
    passage_characters: Count = Field(1000, description="longest passage; longer messages are cut")


class LlmLingua2Strategy(_Untrained):
    """Compression: the words of the history that a small classifier keeps."""

    kind: Literal["llmlingua2"]
    model: str = Field(
        "microsoft/llmlingua-2-xlm-roberta-large-meetingbank",
        description="folder or Hub id of the classifier",
    )
    rate: Number = Field(0.33, gt=0, le=1, description="share of the words that is kept")


class MemoryBankStrategy(_Untrained):
    """MemoryBank: summaries of every session, and passages recalled by relevance and a forgetting curve."""

    kind: Literal["memory_bank"]
    top_k: Count = Field(6, description="passages recalled for a question")
    passage_characters: Count = Field(1000, description="longest passage; longer messages are cut")
    lifetime: Number = Field(5.0, gt=0, description="sessions in which an unrecalled passage fades to 1/e")
    summary_tokens: Annotated[int, Field(ge=0)] = Field(100, description="of a session's summary; 0: none")


class LoraStrategy(Section):
    """A LoRA adapter (PEFT) of the backbone, trained on the same episodes as the δ-mem adapters."""

    trained: ClassVar[bool] = True

    kind: Literal["lora"]
    context: bool = Field(description="whether the prompt has the context (Context2LoRA) or the question alone")
    rank: Count = Field(8, description="of the low-rank matrices")
    alpha: Count = Field(16, description="what they add is scaled by alpha / rank")
    target_modules: Annotated[list[str], Field(min_length=1), AfterValidator(unique)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        description="projections that get them, by their names in the backbone",
    )
    train: dict[str, Any] = Field(default_factory=dict, description="keys of the train section that differ here")


class MemGenStrategy(Section):
    """MemGen: latent tokens that a second, trained copy of the backbone (the weaver) inserts into what it reads."""

    trained: ClassVar[bool] = True

    kind: Literal["memgen"]
    rank: Count = Field(16, description="of the weaver's LoRA")
    alpha: Count = Field(32, description="what that adds is scaled by alpha / rank")
    dropout: Number = Field(0.1, ge=0, lt=1, description="of what that reads, in training")
    target_modules: Annotated[list[str], Field(min_length=1), AfterValidator(unique)] = Field(
        ["q_proj", "v_proj"], description="projections that get it, by their names in the backbone"
    )
    prompt_latents: Count = Field(8, description="latent tokens at the prompt's end")
    answer_latents: Count = Field(8, description="latent tokens at each place in the answer")
    insertions: Annotated[int, Field(ge=0)] = Field(5, description="such places in an answer, at most")
    train: dict[str, Any] = Field(default_factory=dict, description="keys of the train section that differ here")


class MlpMemoryStrategy(Section):
    """MLP Memory: a network that imitates retrieval from the training texts, mixed with the backbone at every token."""

    trained: ClassVar[bool] = True

    kind: Literal["mlp_memory"]
    depth: Count | None = Field(None, description="blocks of the network; null: as many as the backbone has layers")
    mix: Number = Field(0.25, gt=0, lt=1, description="weight λ of the network's distribution at decoding")
    neighbours: Count = Field(1024, description="nearest tokens of the training texts that a target is made of")
    temperature: Number = Field(16.0, gt=0, description="what their squared distances are divided by")
    kl_weight: Number = Field(
        0.5, ge=0, le=1, description="of the neighbours' distribution in the loss; the rest is the next token's"
    )
    index: str = Field(
        "Flat", description="faiss's index, as its index_factory names them: Flat is exact, IVF4096,Flat is fast"
    )
    probes: Count = Field(32, description="lists that an IVF index searches")
    train: dict[str, Any] = Field(default_factory=dict, description="keys of the train section that differ here")


FROZEN = "frozen"
"""Name under which the frozen backbone is evaluated, beside the strategies."""


class DeltaStrategy(Section):
    """A delta-mem adapter: how its memory is written, and what its training changes."""

    trained: ClassVar[bool] = True

    kind: Literal["delta"]
    adapter: dict[str, Any] = Field(
        description="fields of deltamem.DeltaMemConfig; layers may also be first_third, middle_third or last_third"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="keys of the train section that differ here")


def _delta_by_default(value: Any) -> Any:
    return {"kind": "delta", **value} if isinstance(value, Mapping) else value


Strategy = Annotated[
    Annotated[
        DeltaStrategy
        | LoraStrategy
        | MemGenStrategy
        | MlpMemoryStrategy
        | Bm25Strategy
        | LlmLingua2Strategy
        | MemoryBankStrategy,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_delta_by_default),
]
