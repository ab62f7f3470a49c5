"""One thread that owns the model and decodes the turns of many sessions together.

Between two decoding steps one part of one new prompt is fed (:mod:`deltamem.chat.prompt_parts`), so a long prompt
delays running replies by a part at a time. New turns take turns with their parts, so a short prompt doesn't
wait for a long one. Turns leave the batch as they finish, and are committed on other threads before their end
is told.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from deltamem.chat.batch import Batch
from deltamem.chat.open_turn import OpenTurn
from deltamem.chat.reply import Reply
from deltamem.chat.state import ChatState
from deltamem.chat.turn import Turn, choose
from deltamem.server.metrics import Metrics


@dataclass(frozen=True)
class Finished:
    """The last event of a job that went well."""

    reply: Reply
    state: ChatState


class Cancelled(Exception):
    """The last event of a job that was called off."""


class BusyError(Exception):
    """Too many jobs are waiting already."""


class StoppedError(Exception):
    """The thread has ended, or ends before it gets to this job."""


T = TypeVar("T", bound=OpenTurn)


@dataclass(eq=False)
class Job(Generic[T]):
    """One turn to be done.

    Attributes:
        turn: what to feed and decode; made beforehand, as tokenizing a long prompt takes a while.
        emit: called from the scheduler's threads with each piece of text (str), then exactly once with
            :class:`Finished` or an exception.
        commit: makes the new state last; its end is awaited before ``Finished`` is told.
        cancelled: set it to call the job off; the turn then leaves no trace, unless it is being committed
            already.
    """

    turn: T
    emit: Callable[[str | Finished | BaseException], None]
    commit: Callable[[ChatState], ChatState]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine(Protocol):
    """What a server needs of whatever computes its turns."""

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        ...

    @property
    def turns(self) -> type[OpenTurn]:
        """The kind of turn that its jobs hold."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job; called in the server's event loop.

        Raises:
            BusyError: too many are waiting.
            StoppedError: :meth:`stop` was called.
        """
        ...

    def stop(self) -> None:
        """End all jobs; what isn't finished is told so."""
        ...


class TurnScheduler:
    """Runs jobs until :meth:`stop`.

    Args:
        most_together: turns in progress: being read or decoded together.
        most_waiting: jobs that may wait for a place.
    """

    turns = Turn

    def __init__(self, metrics: Metrics, most_together: int = 8, most_waiting: int = 256):
        self.metrics = metrics
        self.most_together = most_together
        self._waiting: queue.Queue[Job[Turn] | None] = queue.Queue(most_waiting)
        self._reading: deque[Job[Turn]] = deque()
        self._active: list[Job[Turn]] = []
        self._stopping = False
        self._commits = ThreadPoolExecutor(2, "deltamem-commit")
        self._thread = threading.Thread(target=self._run, name="deltamem-scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            BusyError: too many are waiting.
            StoppedError: :meth:`stop` was called.
        """
        if self._stopping:
            raise StoppedError("the server is shutting down")
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise BusyError("too many requests are waiting; try again") from None
        self._tell()

    def stop(self) -> None:
        """End all jobs (what isn't finished is told so) and the thread."""
        self._stopping = True
        try:
            self._waiting.put_nowait(None)  # wakes the thread; a full queue wakes it too
        except queue.Full:
            pass
        self._thread.join()
        self._commits.shutdown()

    def _run(self) -> None:
        batch = Batch()
        with torch.no_grad():
            while not self._stopping:
                self._admit()
                self._drop_cancelled(batch)
                self._tell()
                if self._reading:
                    self._read()
                if self._active:
                    batch = self._step(batch)
                self._tell()
        left = [*self._reading, *self._active]
        self._reading, self._active = deque(), []
        while not self._waiting.empty():
            if (job := self._waiting.get_nowait()) is not None:
                left.append(job)
        for job in left:
            job.emit(StoppedError("the server is shutting down"))

    def _admit(self) -> None:
        """Give waiting jobs the free places; waits for a job when there is nothing else to do."""
        while (busy := len(self._reading) + len(self._active)) < self.most_together:
            try:
                job = self._waiting.get(block=not busy)
            except queue.Empty:
                break
            if job is None:
                break
            self._reading.append(job)

    def _drop_cancelled(self, batch: Batch) -> None:
        for jobs in (self._reading, self._active):
            for job in [job for job in jobs if job.cancelled.is_set()]:
                jobs.remove(job)
                batch.drop([job.turn])
                job.emit(Cancelled())

    def _read(self) -> None:
        """Feed one part of the prompt whose turn it is."""
        job = self._reading.popleft()
        try:
            logits = job.turn.feed_prompt()
            if logits is None:
                self._reading.append(job)
                return
            self._accept([job], logits)
        except Exception as error:
            job.emit(error)
            return
        self._active.append(job)
        self._finish_done(Batch())

    def _step(self, batch: Batch) -> Batch:
        jobs = list(self._active)
        self.metrics.batch_size.observe(len(jobs))
        try:
            logits = batch.step([job.turn for job in jobs])
            self._accept(jobs, logits)
            self._finish_done(batch)
            return batch
        except Exception as error:
            # whose fault it was can't be told: all turns of the batch end, none is committed
            for job in self._active:
                job.emit(error)
            self._active = []
            return Batch()

    def _tell(self) -> None:
        self.metrics.waiting.set(self._waiting.qsize())
        self.metrics.reading.set(len(self._reading))
        self.metrics.active.set(len(self._active))

    def _accept(self, jobs: Sequence[Job[Turn]], logits: torch.Tensor) -> None:
        turns = [job.turn for job in jobs]
        for job, token in zip(jobs, choose(turns, logits), strict=True):
            piece = job.turn.accept(token)
            if piece:
                job.emit(piece)

    def _finish_done(self, batch: Batch) -> None:
        done = [job for job in self._active if job.turn.finish_reason]
        if not done:
            return
        batch.release([job.turn for job in done if job.turn in batch])
        for job in done:
            self._active.remove(job)
            try:
                state = job.turn.finish()
            except Exception as error:
                job.emit(error)
            else:
                self._commits.submit(self._commit, job, state)

    def _commit(self, job: Job[Turn], state: ChatState) -> None:
        reply = job.turn.summary()
        try:
            event = Finished(reply, job.commit(state))
        except Exception as error:
            event = error
        self.metrics.count(reply)
        job.emit(event)
