"""The methods of a run in the order of the report, and what sets an ablation apart from the plain adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.config import FROZEN, Config
from pipelines.config.adapter import THIRDS, adapter_config
from pipelines.strategies.kinds import KINDS

PLAIN = "tsw"
"""The write strategy whose default adapter ablations are measured against."""

_ASKED = "train.write_questions"
_GROUPS = {
    "steer": "heads", "layers": "depth", "rank": "rank", "alpha": "scale", "num_states": "states", _ASKED: "questions"
}  # fmt: skip
_FOLLOWS = {"alpha": "rank"}
"""Fields whose change belongs to another's: the scale to the rank."""
_HOW_FAST = {"cuda_graphs", "compile_backbone"}
"""Keys of the train section that change an adapter by rounding alone."""
_WRITES = ("token", "sentence", "message")


class Ablation(NamedTuple):
    """The one thing in which an adapter differs from the plain one, how it is set, and how there; ``order`` is
    what settings are sorted by."""

    group: str
    setting: str
    order: Any
    plain_setting: str
    plain_order: Any


class Methods:
    """What a run compares: the frozen backbone, then baselines, LoRA and δ-mem adapters.

    Attributes:
        names: all of them, in the order of the report.
        plain: the δ-mem strategy with the default adapter, None if the run has none.
        of_paper: {row of the paper's table: our method}.
        ablations: of the strategies that differ from ``plain`` in one thing.
        variants: the ablations that are not also one of the paper's three strategies.
    """

    def __init__(self, config: Config) -> None:
        order = list(KINDS)
        ranked = sorted(config.strategies.items(), key=lambda item: order.index(item[1].kind))
        self.names = [FROZEN, *(name for name, _ in ranked)]
        self._strategies: Mapping[str, Any] = dict(ranked)
        self.of_paper = {FROZEN: FROZEN}
        for name, strategy in ranked:
            if (row := KINDS[strategy.kind].paper_row(strategy)) is not None:
                self.of_paper.setdefault(row, name)
        self.plain = self.of_paper.get(PLAIN)
        self.ablations: dict[str, Ablation] = {}
        if self.plain:
            for name in self.with_memory:
                change = _difference(self._strategies[name], self._strategies[self.plain])
                if change is not None:
                    self.ablations[name] = change
        self.variants = set(self.ablations) - set(self.of_paper.values())

    @property
    def main(self) -> list[str]:
        """All methods but the ablations' variants."""
        return [name for name in self.names if name not in self.variants]

    @property
    def with_memory(self) -> list[str]:
        return [name for name, strategy in self._strategies.items() if KINDS[strategy.kind].has_memory]

    @property
    def without_memory(self) -> list[str]:
        """What is trained and has no memory apart from its weights: no condition can empty or swap it."""
        return [name for name in self.trained if name not in self.with_memory]

    @property
    def trained(self) -> list[str]:
        return [name for name, strategy in self._strategies.items() if strategy.trained]

    @property
    def adaptation_control(self) -> str | None:
        """The LoRA that was trained without any context."""
        return next((name for name, s in self._strategies.items() if s.kind == "lora" and not s.context), None)

    def groups(self) -> dict[str, list[tuple[str, str]]]:
        """Ablations by what they change: {group: [(setting, method), …]}, the plain adapter among them.

        A group without a variant of its own (only msw, say) is left out.
        """
        if self.plain is None:
            return {}
        found: dict[str, set[tuple[Any, str, str]]] = {}
        for name, change in self.ablations.items():
            members = found.setdefault(change.group, set())
            members |= {
                (change.order, change.setting, name),
                (change.plain_order, change.plain_setting, self.plain),
            }
        return {
            group: [(setting, name) for _, setting, name in sorted(members)]
            for group, members in found.items()
            if self.variants & {name for _, _, name in members}
        }


def _adapter(strategy: Any) -> dict[str, Any]:
    """All fields of a δ-mem adapter's configuration; thirds of the layers stay words."""
    fields = adapter_config(strategy.adapter, len(THIRDS)).to_dict()
    layers = strategy.adapter.get("layers")
    return fields | ({"layers": layers} if isinstance(layers, str) else {})


def _fields(strategy: Any) -> dict[str, Any]:
    """All that can differ between two δ-mem strategies; of the write strategy what it writes at once, as "msw" is no
    more than a number of states."""
    fields = _adapter(strategy)
    segment, whose = fields.pop("segment"), fields.pop("segmentation")
    by_release = " of the release" if whose == "release" else ""
    fields["write"] = segment + by_release if fields.pop("strategy") == "ssw" else "token"
    return fields | {f"train.{key}": value for key, value in strategy.train.items() if key not in _HOW_FAST}


def _difference(strategy: Any, plain: Any) -> Ablation | None:
    """None for the plain adapter itself, and for one that differs from it in several things."""
    ours, theirs = _fields(strategy), _fields(plain)
    changed = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    changed -= {key for key, leader in _FOLLOWS.items() if leader in changed}
    if len(changed) != 1:
        return None
    (key,) = changed
    name = _GROUPS.get(key, key)
    return Ablation(
        name,
        _setting(key, ours.get(key)),
        _order(key, ours.get(key)),
        _setting(key, theirs.get(key)),
        _order(key, theirs.get(key)),
    )


def _setting(key: str, value: Any) -> str:
    if key == "layers":
        return "all" if value is None else _span(value)
    if key == "steer":
        return "".join(value)
    if key == _ASKED:
        return "written" if value else "only read"
    if value is None:
        return "as configured"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _order(key: str, value: Any) -> tuple[int, float, str]:
    """Numbers by size, heads by how many, layers by the first; what isn't set comes last."""
    value = bool(value) if key == _ASKED else value
    if isinstance(value, int | float):
        return 0, value, ""
    if key == "steer":
        return 0, 10 * len(value) + "qkvo".index(value[0]), ""
    for words in (THIRDS, _WRITES):
        if value in words:
            return 0, words.index(value), ""
    if isinstance(value, list):
        return 0, value[0], ""
    return 1, 0, str(value)


def _span(layers: Sequence[int] | str) -> str:
    if isinstance(layers, str):
        return layers.replace("_", " ")
    whole = list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}–{layers[-1]}" if list(layers) == whole else f"layers {', '.join(map(str, layers))}"
