"""What a δ-mem training may do beside asking each text's questions: sections of ``train``, all off by default."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipelines.config.types import Count, Number, Section, Share


class Contrast(Section):
    """Reads the questions again with another document's memory of the same step, and learns to tell the two apart.

    The loss gains weight · softplus(1 − (its answer NLL − that of the right memory)), in nats per token, question by
    question.
    """

    weight: Number = Field(0.5, gt=0, description="of this part of the loss, in the beginning")
    until: Number = Field(
        0.5, gt=0, le=1, description="share of the steps at which the weight is zero; it falls from 60 % of them on"
    )


class RepeatText(Section):
    """Asks for some texts as a whole ("Repeat the text."): a target in every word of what was written."""

    weight: Number = Field(0.5, gt=0, description="of this part of the loss, the mean over the texts")
    texts: Count = Field(16, description="texts of a step that are to be repeated")
    max_tokens: Count = Field(256, description="texts of more written tokens aren't repeated")


class WriteAfter(Section):
    """Writes other texts of the step into a memory after its own, before the questions are read: training to retain."""

    texts: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2, 4], min_length=1, description="how many others, in different steps"
    )
    shares: list[Annotated[Number, Field(ge=0)]] = Field(
        [0.3, 0.3, 0.2, 0.2], description="of the steps, relative to each other, for each of these numbers"
    )

    @model_validator(mode="after")
    def _a_share_for_each(self) -> WriteAfter:
        if len(self.shares) != len(self.texts) or not sum(self.shares):
            raise ValueError(
                f"shares has {len(self.shares)} entries for {len(self.texts)} numbers of texts; give one for each, "
                "not all zero"
            )
        return self


class CarryMemory(Section):
    """Begins the memory of a text as earlier steps left another's, without gradients between them: long histories."""

    share: Share = Field(0.5, description="of the memories; the others begin empty in every step")
    texts: Count = Field(32, description="texts that are written one after the other into such a memory, in the mean")
    ask_earlier: Share = Field(
        0.5, description="share of these memories, in every step, that are asked about one of their earlier texts"
    )
    anew_every: Count = Field(
        100,
        description="steps after which all begin empty again; train.checkpoint_every is a multiple of it, so that a "
        "training that goes on from a checkpoint is like one that was never interrupted",
    )


def without_unused(train: dict[str, Any]) -> dict[str, Any]:
    """A train section as plain values, without what is off: a key that came later changes no earlier adapter."""
    return {name: value for name, value in train.items() if name not in _LATER or value}


_LATER = {"init_adapter", "contrast", "repeat_text", "write_after", "carry_memory", "keep_distribution", "cuda_graphs"}
