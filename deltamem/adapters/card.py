"""The model card of an adapter, and what evaluations found, as Markdown.

An evaluation is what the stage ``python -m pipelines.evaluate`` writes: the same questions under several conditions,
with 95 % intervals by a bootstrap over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltamem.config import DeltaMemConfig
from deltamem.errors import AdapterFormatError

_HEADINGS = {"nll": "NLL (nats per token, lower is better)", "f1": "F1", "exact_match": "exact match"}
_EFFECTS = {
    "memory_effect": "memory effect (state − swapped, positive is better)",
    "context_recovery": "context recovery ((state − none) / (full − none))",
}
_CONTROLS = """\
One adapter answers the same questions under each condition: `none`, the question alone; `state`, with the memory of
the right document; `swapped`, with the memory of another one; `full`, with the document in the prompt. What `state`
has over `swapped` is memory; what `swapped` has over `none` is only adaptation to the task. In brackets, 95 %
intervals of a bootstrap over documents; a verdict is given where one condition is compared with another."""


def model_card(config: DeltaMemConfig, parameters: int, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of an adapter's README.md.

    Args:
        parameters: how many the adapter has.
        evaluations: results to show, see :func:`evaluation_table`.
    """
    base = config.base_model_name_or_path or "unknown"
    text = f"""---
library_name: deltamem
base_model: {base}
tags: [delta-mem, memory, adapter]
---

# δ-mem adapter for {base}

An online memory of {config.num_states} state(s) of {config.rank}×{config.rank} per attention layer, strategy
{config.strategy.upper()}, steering {", ".join(config.steer)}; {parameters:,} parameters. The backbone is frozen and
not included. Method: arXiv 2605.12357.

```python
from transformers import AutoModelForCausalLM
from deltamem import DeltaMemModel

base = AutoModelForCausalLM.from_pretrained("{base}")
model = DeltaMemModel.from_pretrained(base, "path/to/this/folder")
memory = model.write(input_ids)                  # tokens to remember
out = model.generate(question_ids, memory=memory)
```
"""
    if evaluations:
        tables = "\n\n".join(map(evaluation_table, evaluations))
        text += f"\n## What it remembers\n\n{_CONTROLS}\n\n{tables}\n"
    return text


def evaluation_table(result: Mapping[str, Any]) -> str:
    """An evaluation's conditions and effects with their intervals, as a Markdown table under its benchmark's name.

    Args:
        result: the content of ``results/…/evals/<backbone>/<strategy>/seed<k>/<benchmark>.json``.

    Raises:
        AdapterFormatError: it isn't such a result.
    """
    try:
        return _table(result["benchmark"], result["conditions"], result["effects"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterFormatError(
            f"not an evaluation's result ({type(error).__name__}: {error}); give what python -m pipelines.evaluate "
            "wrote"
        ) from error


def _table(benchmark: str, conditions: Mapping[str, Mapping[str, Any]], effects: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(metric for scores in conditions.values() for metric in scores))
    rows = [(name, [scores.get(metric) for metric in metrics]) for name, scores in conditions.items()]
    for effect, words in _EFFECTS.items():
        found = [effects.get(f"{effect}_{metric}") for metric in metrics]
        rows += [(f"**{words}**", found)] if any(found) else []
    scores = [score for by_metric in conditions.values() for score in by_metric.values()]
    most = max(scores, key=lambda score: score["n"])
    lines = [
        f"### {benchmark}",
        "",
        f"{most['n']} questions in {most['clusters']} documents or conversations.",
        "",
        _line(["condition", *(_HEADINGS.get(metric, metric.replace("_", " ")) for metric in metrics)]),
        _line(["---"] * (1 + len(metrics))),
        *(_line([name, *map(_cell, found)]) for name, found in rows),
    ]
    return "\n".join(lines)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    if estimate["value"] is None:
        return f"undefined: {estimate['note']}" if "note" in estimate else "undefined"
    text = _number(estimate["value"])
    if estimate["low"] is not None:
        text += f" [{_number(estimate['low'])}, {_number(estimate['high'])}]"
    return f"{text} {estimate['verdict']}" if "verdict" in estimate else text


def _number(value: float) -> str:
    # adding 0 makes a rounded −0 a 0
    return f"{round(value, 3) + 0:.3f}".replace("-", "−")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
