"""Work for the next step that is done while this one is at the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(make: Callable[[int], T], steps: range) -> Iterator[tuple[int, T]]:
    """Every step with what is made for it, in a thread and one step before it is asked for.

    What ``make`` raises is raised at its step.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = [thread.submit(make, step) for step in steps[:1]]
        for step in steps:
            made = coming.pop().result()
            coming += [thread.submit(make, after) for after in range(step, steps.stop)[1:2]]
            yield step, made
