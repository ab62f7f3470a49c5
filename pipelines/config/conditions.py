"""The conditions under which questions are asked: the one table that configuration, evaluation and report go by.

What each is for is told in ``pipelines.evaluation``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

ConditionName = Literal["none", "state", "swapped", "unrelated", "permuted", "strength_0", "strength_2", "full"]


class Condition(NamedTuple):
    """What a question finds when it is asked.

    Attributes:
        prompt, memory, words: what the prompt and the memory hold, and what the answer tells, as the report words it.
        history_in_prompt: whether the history stands before the question, and is written as it is read.
        written_from: whose history the memory is written from before the question: that of the question's own
            context or of another, or text of an unrelated corpus; None: the memory is empty.
        layers_permuted: whether every layer reads the state that another one wrote.
        layer_swapped: the one layer that reads the state of another question's history; None: there is none.
        strength: how strongly the memory steers, 1 as trained.
        by_default: whether a configuration that names no conditions asks under it.
    """

    prompt: str
    memory: str
    words: str
    history_in_prompt: bool = False
    written_from: Literal["own", "other", "corpus"] | None = None
    layers_permuted: bool = False
    layer_swapped: int | None = None
    strength: float = 1.0
    by_default: bool = True

    @property
    def needs_memory(self) -> bool:
        """Whether a model without a memory can't be asked under it."""
        return self.written_from is not None


CONDITIONS: Mapping[str, Condition] = {
    "none": Condition("question", "empty", "What the model says from the question alone."),
    "state": Condition(
        "question",
        "written from the right history",
        "What it says with its memory of the history.",
        written_from="own",
    ),
    "swapped": Condition(
        "question",
        "written from another question's history",
        "The control: whatever this gains over none is adaptation to the task, not memory.",
        written_from="other",
    ),
    "unrelated": Condition(
        "question",
        "written from as much text of an unrelated corpus",
        "A further control: what a memory does that was filled by anything at all.",
        written_from="corpus",
        by_default=False,
    ),
    "permuted": Condition(
        "question",
        "written from the right history, each layer's state given to the next",
        "A further control: what is left of state when no layer finds what it wrote.",
        written_from="own",
        layers_permuted=True,
        by_default=False,
    ),
    "strength_0": Condition(
        "question",
        "written from the right history, steering nothing",
        "What the frozen model says: the answers of none, to the bit, where questions are only read.",
        written_from="own",
        strength=0.0,
        by_default=False,
    ),
    "strength_2": Condition(
        "question",
        "written from the right history, steering twice as much as trained",
        "How the answers of state change when the memory is turned up.",
        written_from="own",
        strength=2.0,
        by_default=False,
    ),
    "full": Condition(
        "history + question",
        "written from the history as it is read",
        "The paper's setting.",
        history_in_prompt=True,
    ),
}
"""By name, in the order in which they are shown."""

_ONE_LAYER = "swapped_layer_"


def one_layer_swapped(layer: int) -> str:
    """The name of the condition under which one layer alone finds another history's state."""
    return f"{_ONE_LAYER}{layer}"


def condition(name: str) -> Condition:
    """A condition by its name, those of single layers too. Raises KeyError for a name that is none."""
    if not name.startswith(_ONE_LAYER):
        return CONDITIONS[name]
    layer = int(name.removeprefix(_ONE_LAYER))
    memory = f"written from the right history, in layer {layer} from another question's"
    words = f"What is left of state when layer {layer} knows another history."
    return Condition("question", memory, words, written_from="own", layer_swapped=layer, by_default=False)


ASKED_BY_DEFAULT = cast("list[ConditionName]", [name for name, condition in CONDITIONS.items() if condition.by_default])
