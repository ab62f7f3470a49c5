"""The adapter's configuration."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from deltamem.errors import ConfigError

STRATEGIES = ("tsw", "ssw", "msw")
HEADS = ("q", "k", "v", "o")
SegmentRule = Literal["message", "sentence", "release_message", "release_sentence"]
"""What one segment of the sequence-state write is, and by whose rule: see ``DeltaMemConfig.segmentation``."""
DEFAULT_NUM_STATES = {"tsw": 1, "ssw": 1, "msw": 4}


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"description": text})


@dataclass
class DeltaMemConfig:
    """What a δ-mem adapter is (arXiv 2605.12357, Method). The defaults are the paper's.

    Raises:
        ConfigError: a value outside its domain, named with what is allowed.
    """

    strategy: Literal["tsw", "ssw", "msw"] = _described(
        "tsw", "When to write: at every token, once per segment, or at every token into several states."
    )
    rank: int = _described(8, "Rows and columns r of a state.")
    alpha: float = _described(16.0, "Reads are scaled by alpha / rank before they steer.")
    num_states: int | None = _described(None, "States N per layer; None means 4 for msw and 1 otherwise.")
    steer: tuple[str, ...] = _described(("q", "o"), "Projections that the reads are added to, out of q, k, v, o.")
    layers: tuple[int, ...] | None = _described(None, "Layers that have a memory; None means all.")
    segment: Literal["message", "sentence"] = _described("message", "What ssw averages before one write.")
    segmentation: Literal["deltamem", "release"] = _described(
        "deltamem",
        "By whose rule: of a message its text alone, or as in the public release the template's text around it too, "
        "whose sentences also end at ; and :.",
    )
    beta_bias_init: float = _described(-1.5, "Initial bias b of the write gate β = sigmoid(W x + b).")
    online_gain: float = _described(0.05, "Length of each steering column at initialisation.")
    output_init: Literal["base_slice", "zero", "random"] = _described(
        "base_slice",
        "Steering columns start from the backbone's own projection (its first columns, as many as the rank; the public "
        "release's scripts take 8 whatever the rank), from zero, or at random.",
    )
    limit_norms: bool = _described(
        False,
        "Whether the adapter's files say how large each state may grow, which keeps a memory usable after many more "
        "tokens than training wrote. Trained, it is one and a half times what states had on average in training.",
    )
    base_model_name_or_path: str | None = _described(None, "The backbone that the adapter was made for.")
    revision: str | None = _described(None, "The backbone's revision.")

    def __post_init__(self) -> None:
        _choose("strategy", self.strategy, STRATEGIES)
        _choose("segment", self.segment, ("message", "sentence"))
        _choose("segmentation", self.segmentation, ("deltamem", "release"))
        _choose("output_init", self.output_init, ("base_slice", "zero", "random"))
        self.num_states = self.states
        for name in ("rank", "num_states"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        for name in ("alpha", "beta_bias_init", "online_gain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
            setattr(self, name, float(value))
        if not isinstance(self.limit_norms, bool):
            raise ConfigError(f"limit_norms must be true or false, got {self.limit_norms!r}")
        if isinstance(self.steer, str) or not self.steer:
            raise ConfigError(f"steer must be a non-empty sequence of {HEADS}, got {self.steer!r}")
        for head in self.steer:
            _choose("steer", head, HEADS)
        # canonical order, so that equal adapters have equal configs
        self.steer = tuple(head for head in HEADS if head in self.steer)
        if self.layers is not None:
            if not self.layers or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in self.layers):
                raise ConfigError(f"layers must be None or non-negative layer numbers, got {self.layers!r}")
            self.layers = tuple(sorted(set(self.layers)))

    @property
    def states(self) -> int:
        """States N per layer."""
        return DEFAULT_NUM_STATES[self.strategy] if self.num_states is None else self.num_states

    @property
    def segment_rule(self) -> SegmentRule:
        """What a segment of the sequence-state write is, and by whose rule."""
        if self.segmentation == "release":
            return "release_message" if self.segment == "message" else "release_sentence"
        return self.segment

    @property
    def width(self) -> int:
        """Channels N·r of the reads."""
        return self.states * self.rank

    @property
    def scale(self) -> float:
        """α / r, the factor between a read and what it adds (paper, Method, step 4)."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON takes them: lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeltaMemConfig:
        """The inverse of :meth:`to_dict`; fields that are left out have their defaults.

        Raises:
            ConfigError: an unknown key, with the closest known one, or a value outside its domain.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"
                raise ConfigError(f"unknown δ-mem option {key!r}{hint}")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**options)


def _choose(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
