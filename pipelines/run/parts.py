"""The parts of a configuration on which each stage's output depends, and nothing else.

The workflow reruns a job when its part changes; the stages record the part's hash with what they make. Keys
that only say how the work is carried out (where Ray runs, how many processes tokenise) are left out.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pipelines.config import FROZEN, Config
from pipelines.config.further_losses import without_unused

_HOW_PREPROCESS = {"processes"}
_HOW_TRAIN = {
    # another number of workers sums a step's gradient in another order: it changes the adapter by rounding
    "num_workers",
    "max_failures",
    "checkpoint_every",
    "cpus_per_worker",
    "gpus_per_worker",
    "ray_address",
    # these watch the training, and change nothing of the adapter
    "validate_every",
    "validation_questions",
    "profile_steps",
    "tracker",
}
_HOW_EVALUATE = {"gpus"}


def backbone(config: Config, name: str) -> dict[str, Any]:
    return {"name": name, "backbone": _plain(config.entry("backbones", name), {"train"})}


def replies(config: Config, source: str) -> dict[str, Any]:
    return {"replies": _of_the_episodes(_plain(config.data.replies[source]))}


def preprocess(config: Config) -> dict[str, Any]:
    data = _plain(config.data, config.data.unused_keys | _HOW_PREPROCESS | {"steps"})
    for name, source in data.get("sources", {}).items():
        data["sources"][name] = _of_the_episodes(source)
    return {"data": data}


_HOW_OFTEN = {"weight", "start", "stop"}
_LATER = {"gaps": 0, "texts": "asked", "first_replies": False, "first_share": 0.0, "value_weight": 1.0}


def _of_the_episodes(source: dict[str, Any]) -> dict[str, Any]:
    """What of a source says what its episodes are, and not how often training draws from them.

    Keys that came later and are as they were taken for granted before change no earlier episodes.
    """
    return {key: value for key, value in source.items() if key not in _HOW_OFTEN and _LATER.get(key, ...) != value}


def train(config: Config, backbone: str, strategy: str, seed: int) -> dict[str, Any]:
    cell = config.cell(backbone, strategy, seed)
    part = {
        "strategy": _plain(cell.strategy, {"train"}),
        "train": without_unused(_plain(cell.train, _HOW_TRAIN)),
        "seed": seed,
    }
    if weights := config.data.weights:
        part |= {"weights": weights, "steps": config.data.steps}
        if spans := {name: span for name, span in config.data.spans.items() if span != (0, 1)}:
            part |= {"spans": spans}
    return part


def evaluate(config: Config, strategy: str, benchmark: str) -> dict[str, Any]:
    part = {
        "benchmark": _plain(config.entry("benchmarks", benchmark)),
        "evaluate": _plain(config.evaluate, _HOW_EVALUATE),
    }
    if not needs_adapter(config, strategy):
        # of a trained strategy the adapter's own record tells
        part["strategy"] = FROZEN if strategy == FROZEN else _plain(config.entry("strategies", strategy))
    return part


def needs_adapter(config: Config, strategy: str) -> bool:
    """Whether a strategy, or ``frozen``, is evaluated with an adapter that has to be trained first."""
    return strategy != FROZEN and config.entry("strategies", strategy).trained


def register(config: Config) -> dict[str, Any]:
    return {"name": config.name, "register": _plain(config.registry, {"live"})}


def report(config: Config) -> dict[str, Any]:
    return {"name": config.name, "report": _plain(config.report)}


def cells(config: Config, backbone: str | None = None) -> list[tuple[str, str, int]]:
    """Every training cell (backbone, strategy, seed), of one backbone or of all."""
    backbones = config.backbones if backbone is None else [backbone]
    trained = [name for name, strategy in config.strategies.items() if strategy.trained]
    return [(b, s, seed) for b in backbones for s in trained for seed in config.seeds]


def evaluations(config: Config) -> list[tuple[str, str, int, str]]:
    """Every evaluation (backbone, strategy, seed, benchmark): first what needs no training, under seed 0.

    A baseline that changes the history has nothing to do on a benchmark without one.
    """
    histories = [name for name, benchmark in config.benchmarks.items() if benchmark.kind != "lm_eval"]
    untrained = [name for name, strategy in config.strategies.items() if not strategy.trained]
    return [
        *((name, FROZEN, 0, benchmark) for name in config.backbones for benchmark in config.benchmarks),
        *((name, strategy, 0, b) for name in config.backbones for strategy in untrained for b in histories),
        *((*cell, benchmark) for cell in cells(config) for benchmark in config.benchmarks),
    ]


def _plain(section: BaseModel, leave_out: set[str] | None = None) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, exclude=leave_out)
