"""The controls of the memory: another history's in ``swapped`` or in one layer, other layers' states in ``permuted``,
and in ``unrelated`` that of a corpus that has nothing to do with the questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate

from deltamem import DeltaMemory
from pipelines.benchmarks.base import Context
from pipelines.errors import StageError


def swap_partners(contexts: Sequence[Context]) -> dict[str, str]:
    """For every context with a history, the context whose history is written instead: {context id: context
    id}.

    The other one belongs to another document or conversation and is about as long (in characters), because
    what a memory holds depends on how much was written: then the two differ in what they say and in little
    else. Contexts, sorted by length, trade histories in pairs (the odd one out in a ring of three), so that
    almost always every history is used once and the memories of ``swapped`` are those of ``state``, dealt out
    otherwise. The order in which contexts come doesn't matter.

    Raises:
        StageError: all histories are of one document, so there is no other.
    """
    ordered = sorted((c for c in contexts if c.to_write), key=lambda context: (_length(context), context.context_id))
    partner: dict[int, int] = {}
    waiting: list[int] = []  # always of one cluster
    for number, context in enumerate(ordered):
        if waiting and _cluster(ordered[waiting[0]]) != _cluster(context):
            other = waiting.pop()
            partner[number], partner[other] = other, number
        else:
            waiting.append(number)
    for number in waiting:
        _join_pair(number, ordered, partner)
    return {ordered[a].context_id: ordered[b].context_id for a, b in partner.items()}


def permute_layers(memory: DeltaMemory) -> DeltaMemory:
    """The same states, each in the place of the next layer's; the last one's takes the first place.

    Raises:
        StageError: there is one layer only.
    """
    layers = list(memory.states)
    if len(layers) < 2:
        raise StageError(
            "The condition 'permuted' gives every layer the state of another one, and this adapter has one layer. "
            "Leave it out of evaluate.conditions."
        )
    moved = [layers[-1], *layers[:-1]]
    return replace(memory, states={layer: memory.states[other] for layer, other in zip(layers, moved, strict=True)})


def swap_layer(memory: DeltaMemory, layer: int, rows: Sequence[int]) -> DeltaMemory:
    """The same states, but in one layer each row has the state of the row that ``rows`` names for it."""
    states = memory.states[layer]
    return replace(memory, states={**memory.states, layer: states[list(rows)]})


def unrelated(context: Context) -> Context:
    """A context whose history says nothing of its questions: messages as long as its own, of another corpus.

    The corpus is the documentation that comes with Python, so that nothing has to be fetched. Where in it a history
    begins is drawn from the context's id.
    """
    corpus, written = unrelated_corpus(), context.to_write
    lengths = [len(message["content"]) for message in written]
    first = int.from_bytes(hashlib.sha256(context.context_id.encode()).digest()[:8]) % len(corpus)
    text = corpus[first:] + corpus * (1 + sum(lengths) // len(corpus))
    starts = accumulate(lengths, initial=0)
    history = [
        message if message["role"] == "system" else {**message, "content": text[start : start + length]}
        for message, start, length in zip(written, starts, lengths, strict=False)
    ]
    return replace(context, context_id=f"unrelated to {context.context_id}", history=history, written=None)


@cache
def unrelated_corpus() -> str:
    """The text that ``unrelated`` writes, without tables and code; it may differ from one Python to the next."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    return "\n".join(part for part in paragraphs if sum(map(str.isalpha, part)) > 0.7 * len(part))


def _join_pair(number: int, ordered: Sequence[Context], partner: dict[int, int]) -> None:
    """Gives a context left over the history of the nearest other one, making a ring of a pair where it
    can."""
    own = _cluster(ordered[number])
    others = [other for other in range(len(ordered)) if _cluster(ordered[other]) != own]
    if not others:
        raise StageError(
            f"The condition 'swapped' needs histories of at least two documents, and there is only {own!r}. "
            "Evaluate more of the benchmark, or leave 'swapped' out of evaluate.conditions."
        )
    nearest = sorted(others, key=lambda other: (abs(other - number), other))
    for first in nearest:
        second = partner.get(first)
        if second is not None and partner.get(second) == first and _cluster(ordered[second]) != own:
            partner[number], partner[second] = first, number
            return
    partner[number] = nearest[0]


def _length(context: Context) -> int:
    return sum(len(message["content"]) for message in context.to_write)


def _cluster(context: Context) -> str:
    return context.questions[0].cluster_id
