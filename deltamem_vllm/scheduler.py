"""The server's turns on vLLM's engine: each is a task that follows its request to its end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from deltamem.errors import DeltaMemError
from deltamem.server.metrics import Metrics
from deltamem.server.scheduler import BusyError, Cancelled, Finished, Job, StoppedError
from deltamem_vllm.turn import EngineTurn

LOOK_SECONDS = 0.2
"""How often it is looked whether a client has left."""
MEMORY_SECONDS = 600.0
"""After which a memory that hasn't come never will; an engine whose cores are taken by others steps slowly."""


class EngineScheduler:
    """Follows jobs until :meth:`stop`. vLLM itself decides which run together.

    Args:
        engine: vLLM's; it ends with this.
        most: turns in progress; more are refused.
    """

    turns = EngineTurn

    def __init__(self, engine: AsyncLLM, metrics: Metrics, most: int):
        self.llm, self.metrics, self.most = engine, metrics, most
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commits = ThreadPoolExecutor(2, "deltamem-commit")
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        return not self._stopping and not self.llm.errored

    def submit(self, job: Job[EngineTurn]) -> None:
        """See :class:`deltamem.server.scheduler.Engine`."""
        if not self.alive:
            raise StoppedError("the server is shutting down" if self._stopping else "the engine has ended")
        if len(self._tasks) >= self.most:
            raise BusyError("too many requests are waiting; try again")
        self._loop = asyncio.get_running_loop()
        task = self._loop.create_task(self._follow(job))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        self.metrics.active.set(len(self._tasks))

    def stop(self) -> None:
        """End all jobs and the engine; called from another thread than the loop's, or after it."""
        self._stopping = True
        for task in list(self._tasks):
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(task.cancel)
        self._commits.shutdown()
        self.llm.shutdown()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.metrics.active.set(len(self._tasks))

    async def _follow(self, job: Job[EngineTurn]) -> None:
        """Run a job; whatever happens, its last event is emitted."""
        work = asyncio.ensure_future(self._run(job))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=LOOK_SECONDS)
                if job.cancelled.is_set():
                    work.cancel()
            job.emit(work.result())
        except asyncio.CancelledError:
            work.cancel()
            job.emit(StoppedError("the server is shutting down") if self._stopping else Cancelled())
        except EngineDeadError:
            job.emit(StoppedError("the engine has ended"))
        except Exception as error:
            job.emit(error)

    async def _run(self, job: Job[EngineTurn]) -> Finished:
        turn, key = job.turn, uuid.uuid4().hex
        async with aclosing(self._tokens(turn.tokens, turn.sampling(key), turn)) as tokens:
            async for token in tokens:
                if turn.finish_reason is None and (piece := turn.accept(token)):
                    job.emit(piece)
                if turn.reply.stopped:  # the engine knows nothing of it and would go on
                    break
        if turn.finish_reason is None:
            raise DeltaMemError("the engine ended the reply before its end")
        memory = None
        if turn.options.write:
            if turn.reply.stopped:  # and may have fed what comes after the stop sequence
                key = uuid.uuid4().hex
                async for _ in self._tokens(turn.fed, turn.rereading(key)):
                    pass
            memory = await self._memory(key)
        state = turn.finish(memory)
        kept = await asyncio.get_running_loop().run_in_executor(self._commits, job.commit, state)
        reply = turn.summary()
        self.metrics.count(reply)
        return Finished(reply, kept)

    async def _tokens(
        self, prompt: list[int], how: SamplingParams, turn: EngineTurn | None = None
    ) -> AsyncGenerator[int]:
        """New tokens as they come; leaving before the end aborts the request."""
        asked: Any = {"prompt_token_ids": prompt}
        async with aclosing(self.llm.generate(asked, how, uuid.uuid4().hex)) as replies:
            async for said in replies:
                if turn is not None and said.num_cached_tokens:
                    turn.cached_tokens = said.num_cached_tokens
                if refused := (said.kv_transfer_params or {}).get("deltamem_error"):
                    raise DeltaMemError(refused)
                for token in said.outputs[0].token_ids:
                    yield token

    async def _memory(self, key: str) -> bytes:
        """The memory kept under a key: the worker has it in the step after the last."""
        pause = 0.001  # and longer each time: many askers would keep the engine from the steps between which it answers
        async with asyncio.timeout(MEMORY_SECONDS):
            while True:
                found = await self.llm.collective_rpc("take_memory", args=(key,))
                if found[0] is not None:
                    return found[0]
                await asyncio.sleep(pause)
                pause = min(2 * pause, LOOK_SECONDS)
