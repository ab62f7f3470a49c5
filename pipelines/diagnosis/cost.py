"""About what a run will cost, before anything is fetched: from sizes that names tell, and rates measured on an H100.

Nothing of it is measured on the machine at hand. A training's own forecast, once its episodes are there, is in its log.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from pipelines.config import Config
from pipelines.config.backbones import RandomBackbone
from pipelines.run import parts
from pipelines.run.files import read_record
from pipelines.run.layout import Layout
from pipelines.training.forecast import FLOPS, seconds_on_an_h100

BANDWIDTH = 1.0e12
"""Bytes of weights a second in decoding: a token took 8.1 ms there, at a context of 4,096 tokens."""
TRAINING_BYTES = 36 * 2**30
"""Besides the weights, in that training step."""


class Asked(NamedTuple):
    """A benchmark's size: its contexts with their tokens, its questions with the tokens of an answer."""

    contexts: int
    tokens: int
    questions: int
    answer: int


_SIZES = {
    "qasper": Asked(281, 6_000, 1_005, 16),
    "locomo": Asked(10, 24_000, 1_540, 20),
    "hotpotqa": Asked(7_405, 1_400, 7_405, 8),
    "memory_agent_bench": Asked(146, 130_000, 3_671, 60),
}
_TASKS = {"ifeval": Asked(541, 100, 541, 600), "gpqa_diamond_cot_zeroshot": Asked(198, 300, 198, 2_000)}
QASPER_EPISODES = 2_219
"""That fit 8,192 tokens; the public release's set has as many."""
QASPER_PAPERS = 888
"""Of its training split."""


class Cost(NamedTuple):
    """Of one backbone: parameters (None: nobody says), jobs that wait, and GPU hours (None: can't be told)."""

    backbone: str
    parameters: float | None
    jobs: int
    training: float | None
    evaluation: float | None


class Costs(NamedTuple):
    """Of all backbones.

    Attributes:
        weight_bytes, training_bytes: of the largest: its weights, and what a training of it takes on a GPU.
        uncounted: benchmarks whose size isn't known here.
    """

    of_backbones: list[Cost]
    weight_bytes: int
    training_bytes: int
    uncounted: list[str]


def estimate_costs(config: Config) -> Costs:
    """What the configuration's jobs will take, whatever of them is done already."""
    costs = [_of_backbone(config, name) for name in config.backbones]
    largest = max((cost.parameters or 0 for cost in costs), default=0)
    tokens = config.data.max_written_tokens + config.data.max_read_tokens
    activations = TRAINING_BYTES * (largest / 4e9) ** (2 / 3) * tokens / 8704 * config.train.micro_batch_size
    known = {name for name, entry in config.benchmarks.items() if _asked(entry)}
    uncounted = [name for name in config.benchmarks if name not in known]
    return Costs(costs, round(2 * largest), round(2 * largest + activations), uncounted)


def _of_backbone(config: Config, name: str) -> Cost:
    size = parameters(name, config.backbones[name])
    cells = parts.cells(config, name)
    asked = [part for part in parts.evaluations(config) if part[0] == name]
    jobs = 3 + 2 * len(cells) + len(asked)  # backbone, preprocess and champion; training and registering
    if size is None:
        return Cost(name, None, jobs, None, None)
    trained = [_training_seconds(config, size, *cell) for cell in cells]
    known = [seconds for seconds in trained if seconds is not None]
    training = sum(known) / 3600 if len(known) == len(trained) else None
    evaluation = sum(_evaluation_seconds(config, size, *part) for part in asked) / 3600
    return Cost(name, size, jobs, training, evaluation)


def parameters(name: str, entry: Any) -> float | None:
    """Of a backbone, by its architecture where it is written out, else as its name has it: "Qwen3-4B" has 4e9."""
    if isinstance(entry, RandomBackbone):
        fields = dict(entry.architecture)
        return _count(AutoConfig.for_model(fields.pop("model_type"), **fields))
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", getattr(entry, "id", name).lower())
    return float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]] if found else None


def _count(config: PreTrainedConfig) -> float:
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return float(layers * hidden * (4 * hidden + 3 * inner) + config.vocab_size * hidden)


def _training_seconds(config: Config, size: float, backbone: str, strategy: str, seed: int) -> float | None:
    """On one GPU."""
    train = config.cell(backbone, strategy, seed).train
    episodes = _episodes(config, backbone, strategy)
    steps = train.max_steps or math.inf
    if episodes is not None:
        steps = min(steps, math.ceil(episodes / train.batch_size) * train.epochs)
    if steps == math.inf:
        return None
    tokens = config.data.max_written_tokens + config.data.max_read_tokens
    return seconds_on_an_h100(size, steps * train.batch_size * tokens)


def _episodes(config: Config, backbone: str, strategy: str) -> int | None:
    """How many there are to train on; MLP Memory learns each text once, whatever is asked about it."""
    texts = config.strategies[strategy].kind == "mlp_memory"
    manifest = Layout(config).data_manifest(backbone, "train")
    if manifest.exists():
        return int(read_record(manifest, "Run the preprocess stage again.")["papers" if texts else "episodes"])
    sources = [source for source in config.data.named_sources.values() if source.weight]
    if not all("qasper" in (getattr(source, "hub_id", "") or "") for source in sources):
        return None
    return QASPER_PAPERS if texts else QASPER_EPISODES


def _evaluation_seconds(config: Config, size: float, backbone: str, strategy: str, seed: int, benchmark: str) -> float:
    asked = _asked(config.benchmarks[benchmark])
    if asked is None:
        return 0.0
    conditions = list(config.evaluate.conditions)
    if config.benchmarks[benchmark].kind == "lm_eval" or not _is_delta(config, strategy):
        conditions = [name for name in conditions if name in ("none", "full")] or ["full"]
    passes = 1 + sum(name in ("state", "swapped") for name in conditions)
    reading = 2 * size * asked.contexts * asked.tokens * passes / FLOPS
    steps = asked.questions * asked.answer * len(conditions) / config.evaluate.batch_size
    return reading + steps * 2 * size / BANDWIDTH


def _is_delta(config: Config, strategy: str) -> bool:
    return strategy in config.strategies and config.strategies[strategy].kind == "delta"


def _asked(entry: Any) -> Asked | None:
    """The size of a benchmark as its entry bounds it; None where it isn't known here."""
    asked = _TASKS.get(entry.task) if entry.kind == "lm_eval" else _SIZES.get(entry.kind)
    if asked is None:
        return None
    contexts = min(asked.contexts, getattr(entry, "max_contexts", None) or asked.contexts)
    each = min(asked.questions / asked.contexts, getattr(entry, "max_questions", None) or math.inf)
    return asked._replace(contexts=contexts, questions=round(contexts * each))


def rows(costs: Costs) -> Iterator[tuple[str, ...]]:
    """Lines of a table: backbone, parameters, jobs, GPU hours of training and of evaluation."""

    def hours(value: float | None) -> str:
        return "?" if value is None else f"{value:.1f}" if value >= 0.1 else "< 0.1"

    for cost in costs.of_backbones:
        size = "?" if cost.parameters is None else f"{cost.parameters / 1e9:.2g} B"
        yield cost.backbone, size, str(cost.jobs), hours(cost.training), hours(cost.evaluation)
