"""Builds in processes of their own.

One that is killed for its memory, or crashes, ends in a message that names its engine.

A worker builds one plan after another and ignores Ctrl-C, which its parent answers by ending it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import Lock

from otcache.schemas.errors import HostError, OTCacheError
from otcache.schemas.messages import one_line

from .plan import BuildJob, BuiltPlan, build_plan


def build_all(jobs: Sequence[BuildJob], workers: int, finished: Callable[[BuildJob, BuiltPlan], None]) -> None:
    """Build every job, `workers` at a time; `finished` is called in this process as each is done.

    Raises HostError at the first that cannot be built; those that were running then are ended.
    """
    waiting = deque(jobs)
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    started = [_Worker(context, lock) for _ in range(min(workers, len(jobs)))]
    try:
        for worker in started:
            worker.give(waiting.popleft())
        busy = {worker.connection: worker for worker in started}
        while busy:
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]  # only connections are waited for
                finished(worker.job, worker.result())
                if waiting:
                    worker.give(waiting.popleft())
                else:
                    del busy[worker.connection]
    finally:
        for worker in started:
            worker.end()


class _Worker:
    """A process that builds one plan after another."""

    job: BuildJob
    """What it was given last."""

    def __init__(self, context: SpawnContext, lock: Lock) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, lock), daemon=True)
        self.process.start()
        other.close()

    def give(self, job: BuildJob) -> None:
        """Have it begin a plan."""
        self.job = job
        with suppress(BrokenPipeError):  # it has died; `result` says so
            self.connection.send(job)

    def result(self) -> BuiltPlan:
        """The plan that it was given last; waits for it. Raises HostError, also where the process has died."""
        try:
            found = self.connection.recv()
        except EOFError:
            self.process.join()
            raise HostError(
                f"{self.job.name}: its build for {self.job.target} ended with code {self.process.exitcode}: expected a "
                "plan: if memory ran out, use --jobs 1 or a host with more; what is finished is kept"
            ) from None
        if isinstance(found, str):
            raise HostError(found)
        return found  # type: ignore[no-any-return]

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, lock: Lock) -> None:
    """Answer jobs with `BuiltPlan`, or with the message of what went wrong, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer: BuiltPlan | str = build_plan(job, lock)
        except OTCacheError as error:
            answer = str(error)
        except MemoryError:
            answer = f"{job.name}: no memory to build it: expected more: use --jobs 1, or a host with more"
        except OSError as error:
            answer = f"{job.name}: {job.output.name} cannot be written: {one_line(error)}: make room, and run it again"
        connection.send(answer)
