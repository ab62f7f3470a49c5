"""An evaluation's table for a model card: all conditions, so that nobody reads `state` without its controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from deltamem.errors import DeltaMemError

CONDITIONS = {
    "none": "question, empty memory",
    "state": "question, memory written from the right history",
    "swapped": "question, memory written from another question's history",
    "full": "history and question, memory written as the history is read",
}
EFFECTS = {
    "memory_effect": "memory effect: state against swapped",
    "context_recovery": "context recovery: (state − none) / (full − none)",
}
HEADING = "## What it remembers"
_NOTE = """What the memory holds shows in `state` against `swapped`: an adapter that has only learned what answers look
like is as good with another question's memory. In brackets 95 % bootstrap intervals, clustered by document; the NLL is
in nats per token of the answer, and in the effects positive is better throughout."""


def read_evaluation(path: Path) -> dict[str, Any]:
    """The result of ``python -m pipelines.evaluate``.

    Raises:
        DeltaMemError: the file isn't one.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeltaMemError(f"{path} can't be read as an evaluation's result: {error}") from error
    if not isinstance(result, dict) or not {"benchmark", "conditions", "effects"} <= set(result):
        raise DeltaMemError(f"{path} is no evaluation's result: it lacks 'benchmark', 'conditions' or 'effects'")
    return result


def evaluation_section(results: list[dict[str, Any]]) -> str:
    """Markdown with one table per evaluation."""
    return "\n\n".join([HEADING, _NOTE, *map(_table, results)]) + "\n"


def eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The same for the Hub's widgets: the scores from the right memory, the effects beside them."""
    found = []
    for result in results:
        scores = {f"{metric} (state)": score for metric, score in result["conditions"].get("state", {}).items()}
        for name, score in {**scores, **result["effects"]}.items():
            if score["value"] is not None:
                found.append(
                    EvalResult(
                        task_type="question-answering",
                        dataset_type=result["benchmark"],
                        dataset_name=f"{result['benchmark']} ({score['n']} questions)",
                        metric_type=name,
                        metric_value=round(score["value"], 4),
                    )
                )
    return found


def _table(result: dict[str, Any]) -> str:
    conditions = result["conditions"]
    metrics = list(next(iter(conditions.values())))
    trained = ", ".join(f"{name} {result[name]}" for name in ("strategy", "seed") if result.get(name) is not None)
    questions = max(score["n"] for scores in conditions.values() for score in scores.values())
    head = f"**{result['benchmark']}**: {questions} questions{f'; {trained}' if trained else ''}"
    lines = [f"| condition | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, scores in conditions.items():
        cells = [_cell(scores.get(metric)) for metric in metrics]
        lines.append(f"| `{name}` ({CONDITIONS.get(name, 'see the project')}) | {' | '.join(cells)} |")
    for prefix, meaning in EFFECTS.items():
        effects = {metric: result["effects"].get(f"{prefix}_{metric}") for metric in metrics}
        if any(effects.values()):
            lines.append(f"| *{meaning}* | {' | '.join(_cell(effects[metric]) for metric in metrics)} |")
    return "\n".join([head, "", *lines])


def _cell(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "–"
    interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['value']:.3f}{interval}"
