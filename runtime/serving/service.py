"""`Service`: a bounded queue in front of one or more loaded samplers, for servers.

One worker thread for each sampler (one sampler for each device). Requests run one by one, in the order of arrival, and
give the bits that `Sampler` gives alone. Only with `max_batch` are those that wait and have one budget, size and
guidance drawn in one run, and with `max_wait_s` a request waits so long for others to join it: that is faster, but
matrix products of another size add up in another order, and the last digits then depend on what else was asked.
"""

from __future__ import annotations

import atexit
import dataclasses
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any

from otcache.schemas.errors import HostError, OTCacheError, RequestError, UsageError
from otcache.schemas.manifest import FULL
from otcache.schemas.messages import one_line

from ..loop.loop import Float32
from ..loop.timing import Timer, Timing
from .batching import can_join, joined
from .governor import Governor
from .request import Request
from .sampler import Sampler

_OPTIONS = (
    "negative_prompt",
    "seed",
    "images_per_prompt",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
)
"""Of a request, beside prompt, budget and time."""
_HISTORY = 32
"""Served requests whose times say how soon the queue moves on."""


class BusyError(HostError):
    """The queue is full. Nothing has been done: the same request may be made again. Exit code 6, HTTP 503."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """In which the requests that wait now should have been served; at least 1."""


class DeadlineError(HostError):
    """A request's time was up before it had been served. Exit code 6, HTTP 504."""


class ClosedError(HostError):
    """The service has been closed. Exit code 6, HTTP 503."""


def http_status(error: BaseException) -> int:
    """The HTTP status that tells a client about an error of this package; 500 for what is not the client's doing."""
    statuses = ((RequestError, 400), (BusyError, 503), (ClosedError, 503), (DeadlineError, 504))
    return next((status for kind, status in statuses if isinstance(error, kind)), 500)


class PictureFuture(Future[Float32]):
    """What `submit` returns: a future of pictures, float32 (n, height, width, 3) in [0, 1].

    `cancel()` also ends a request that runs: at its next step, with CancelledError. `asyncio.wrap_future` makes it
    awaitable, and cancelling the task that awaits it cancels the request.
    """

    def __init__(
        self, service: Service, request: Request, minimum_budget: str | None, begins: float, deadline: float
    ) -> None:
        super().__init__()
        self.request = request
        """What was asked for."""
        self.minimum_budget = minimum_budget
        """Below which it is not lowered; None leaves that to the governor."""
        self.budget: str | None = None
        """The budget that is served, from when it runs; lower than asked for if the service degrades."""
        self.timing: Timing | None = None
        """Where the time went, queue included; there when the pictures are."""
        self._service = service
        self._begins = begins
        """When it runs at the latest if a worker is free: until then it waits for others that may run with it."""
        self._deadline = deadline
        self._timer = Timer()
        self._outcome: BaseException | None = None
        """Why it must end without pictures."""
        self._ended = False

    def cancel(self) -> bool:
        """True if the request ends without pictures: now if it waits, at its next step if it runs."""
        return self._service._cancel(self)


class Service:
    """Samplers behind a queue. Takes the samplers over: `close` closes them. Safe to call from any thread."""

    def __init__(
        self,
        *samplers: Sampler,
        capacity: int = 16,
        max_images: int = 16,
        max_batch: int = 1,
        max_wait_s: float = 0.0,
        timeout_s: float = math.inf,
        governor: Governor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """samplers: of one artifact, one for each device.

        capacity: requests that may wait. max_images: pictures that one request may ask for. max_batch: pictures of
        several requests that may be drawn in one run. max_wait_s: that the first request in the queue waits for others
        to fill a run; 0 takes those that are there. timeout_s: for requests that name none. governor: lowers the
        budgets under load. Raises UsageError.
        """
        if not samplers or len({sampler.manifest.digest for sampler in samplers}) != 1:
            raise UsageError(f"service: received {len(samplers)} samplers: expected one or more of the same artifact")
        for name, value in (("capacity", capacity), ("max_images", max_images), ("max_batch", max_batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} is {one_line(repr(value), 40)}: expected a whole number of at least 1")
        _check_timeout(timeout_s)
        if not _is_seconds(max_wait_s) or not 0 <= max_wait_s < math.inf:
            raise UsageError(f"max_wait_s is {one_line(repr(max_wait_s), 40)}: expected seconds, at least 0")
        if governor is not None and governor.budgets != samplers[0].budgets:
            raise UsageError(
                f"governor is for budgets {one_line(governor.budgets)}: expected the artifact's, {samplers[0].budgets}"
            )
        self.sampler = samplers[0]
        self.capacity, self.max_images, self.max_batch = capacity, max_images, max_batch
        self.max_wait_s = max_wait_s if max_batch > 1 else 0.0
        self._samplers, self._timeout_s, self._governor, self._clock = samplers, timeout_s, governor, clock
        self._changed = threading.Condition()
        self._waiting: deque[PictureFuture] = deque()
        self._running: set[PictureFuture] = set()
        self._durations: deque[float] = deque(maxlen=_HISTORY)
        self._closed = False
        names = [f"otcache-{os.path.basename(sampler.artifact.folder)}-{i}" for i, sampler in enumerate(samplers)]
        self._workers = [
            threading.Thread(target=self._work, args=(sampler,), name=name, daemon=True)
            for name, sampler in zip(names, samplers, strict=True)
        ]
        for worker in self._workers:
            worker.start()
        atexit.register(self.close)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def accepts(self) -> bool:
        """Whether a request would be taken now: the service is open, and the queue is not full."""
        return not self._closed and len(self._waiting) < self.capacity

    @property
    def is_alive(self) -> bool:
        """Whether the service is open and every worker runs."""
        return not self._closed and all(worker.is_alive() for worker in self._workers)

    def submit(
        self,
        prompt: str | list[str],
        *,
        budget: int | str | None = None,
        minimum_budget: int | str | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> PictureFuture:
        """Put a request into the queue; `result()` of what is returned waits for the pictures.

        Raises RequestError for what is not served, BusyError if the queue is full, ClosedError.

        Args:
            prompt: as of `Sampler`.
            budget: the highest that may be served; None takes the artifact's highest.
            minimum_budget: the lowest that may be served under load. Left out it is the governor's own floor; of a
                request that asks for `full` by name it is `full`: that is not lowered unless this says that it may be.
            timeout_s: from now to the end; past it the request ends with DeadlineError, at a step if it runs.
            options: as of `Sampler`.
        """
        if timeout_s is not None:
            _check_timeout(timeout_s)
        wanted = self.sampler.budgets[-1] if budget is None else budget
        if odd := sorted(set(options) - set(_OPTIONS)):
            raise RequestError(f"{one_line(odd[0], 40)} is no option of a request: expected {', '.join(_OPTIONS)}")
        asked = self.sampler.request(prompt, budget=wanted, most_samples=self.max_images, **options)
        minimum = _minimum_budget(self.sampler.budgets, budget, minimum_budget)
        self._end_late()
        with self._changed:
            if self._closed:
                raise _closed_error()
            if len(self._waiting) >= self.capacity:
                raise self._busy()
            now = self._clock()
            deadline = now + (self._timeout_s if timeout_s is None else timeout_s)
            future = PictureFuture(self, asked, minimum, now + self.max_wait_s, deadline)
            if self._governor is not None:
                self._governor.arrived(now)
            self._waiting.append(future)
            self._changed.notify()
        return future

    def submit_all(self, requests: Sequence[Mapping[str, Any]]) -> list[PictureFuture | OTCacheError]:
        """As `submit` with the arguments of each, and all are in the queue before the first of them runs.

        Of a request that `submit` refuses its error stands in its place.
        """
        with self._changed:
            return [self._submitted(request) for request in requests]

    def _submitted(self, request: Mapping[str, Any]) -> PictureFuture | OTCacheError:
        try:
            return self.submit(**request)
        except OTCacheError as error:
            return error

    def close(self) -> None:
        """End everything: waiting requests with ClosedError now, running ones with it at their next step.

        Returns when workers have ended and samplers are closed.
        """
        with self._changed:
            already, self._closed = self._closed, True
            waiting = list(self._waiting)
            self._waiting.clear()
            for future in self._running:
                future._outcome = future._outcome or _closed_error()
            self._changed.notify_all()
        for future in waiting:
            self._end(future, None, _closed_error())
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()
        if not already:
            atexit.unregister(self.close)
        for sampler in self._samplers:
            sampler.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, sampler: Sampler) -> None:
        """What a worker does until the service is closed."""
        while batch := self._next(sampler):
            self._run(sampler, batch)
            del batch  # or an idle worker would hold the last pictures

    def _next(self, sampler: Sampler) -> list[PictureFuture]:
        """The next request to run, and those that may run with it; waits for one. Empty when the service is closed."""
        while True:
            self._end_late()
            with self._changed:
                if self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                batch, is_full = self._gather(sampler)
                if not is_full and (left_s := self._waiting[0]._begins - self._clock()) > 0:
                    self._changed.wait(left_s)
                    continue
                return [self._begin(future, budget) for future, budget in batch]

    def _gather(self, sampler: Sampler) -> tuple[list[tuple[PictureFuture, str]], bool]:
        """The first waiting request and those that may run with it, with the budgets that the load allows; and whether
        no other could join them.
        """
        first = self._waiting[0]
        request = self._request_now(first)
        batch, samples = [(first, request.budget)], request.samples
        for other in tuple(self._waiting)[1:] if self.max_batch > 1 else ():
            wanted = self._request_now(other)
            if can_join(request, wanted) and self._can_hold(sampler, samples + wanted.samples, request):
                batch.append((other, wanted.budget))
                samples += wanted.samples
        return batch, not self._can_hold(sampler, samples + 1, request)

    def _can_hold(self, sampler: Sampler, samples: int, request: Request) -> bool:
        return samples <= self.max_batch and sampler.can_hold(samples, request)

    def _begin(self, future: PictureFuture, budget: str) -> PictureFuture:
        """Take a request from the queue to the device."""
        self._waiting.remove(future)
        future.set_running_or_notify_cancel()
        self._running.add(future)
        future.budget = budget
        future._timer.waited()
        return future

    def _allowed_budget(self, future: PictureFuture) -> str:
        wanted = future.request.budget
        return wanted if self._governor is None else self._governor.budget(self._clock(), wanted, future.minimum_budget)

    def _request_now(self, future: PictureFuture) -> Request:
        """What was asked for, at the budget that the load allows now."""
        return future.request.at_budget(self._allowed_budget(future))

    def _run(self, sampler: Sampler, batch: list[PictureFuture]) -> None:
        """Draw what a batch asks for. One that fails runs again request by request: others are not to blame for it."""
        images, outcome, start = None, None, self._clock()
        timer = batch[0]._timer if len(batch) == 1 else Timer()
        try:
            request = joined([_request_at(future) for future in batch])
            images = sampler.draw(request, progress=self._step(batch), timer=timer)
        except BaseException as error:
            outcome = error
        if outcome is not None and len(batch) > 1 and not isinstance(outcome, _Stop):
            for future in batch:
                if not future._ended:
                    self._run(sampler, [future])
            return
        each_s, first = (self._clock() - start) / len(batch), 0
        for future in batch:
            own, first = slice(first, first + future.request.samples), first + future.request.samples
            if not future._ended:
                drawn = images if images is None or len(batch) == 1 else images[own].copy()
                self._end(future, drawn, outcome, each_s, timer)

    def _step(self, batch: list[PictureFuture]) -> Callable[[int, int], None]:
        """The callback of a batch's steps: ends the requests that must end, and waiting ones whose time is up."""

        def check(done: int, total: int) -> None:
            self._end_late()
            with self._changed:
                for future in batch:
                    if future._outcome is None and not future._ended and self._clock() > future._deadline:
                        future._outcome = DeadlineError(
                            f"request: its time was up after {done} of {total} steps: expected to end sooner: allow "
                            "more time, or a lower budget"
                        )
                if all(future._ended or future._outcome is not None for future in batch):
                    raise _Stop
                over = [future for future in batch if future._outcome is not None]
            for future in over:  # the others go on
                self._end(future, None, None)

        return check

    def _end_late(self) -> None:
        """End the waiting requests whose time is up."""
        with self._changed:
            now = self._clock()
            late = [future for future in self._waiting if now > future._deadline]
            for future in late:
                self._waiting.remove(future)
        for future in late:  # without the lock: settling a future calls its owner's callbacks
            what = "its time was up while it waited: expected a shorter queue: try again later, or allow more time"
            self._end(future, None, DeadlineError(f"request: {what}"))

    def _cancel(self, future: PictureFuture) -> bool:
        with self._changed:
            if future in self._waiting:
                self._waiting.remove(future)
            elif future._ended or future not in self._running:
                return future.cancelled()
            else:
                future._outcome = future._outcome or CancelledError()
                return True
            future._ended = True
            self._left()
        Future.cancel(future)
        future.set_running_or_notify_cancel()
        return True

    def _end(
        self,
        future: PictureFuture,
        images: Float32 | None,
        outcome: BaseException | None,
        seconds: float | None = None,
        timer: Timer | None = None,
    ) -> None:
        """Settle a request that has left the queue, or the device after so many seconds, which a timer has seen."""
        with self._changed:
            outcome = future._outcome or outcome
            future._ended = True
            future._outcome = None
            self._running.discard(future)
            self._left()
            if seconds is not None and outcome is None:
                self._durations.append(seconds)
        if outcome is None and images is not None:
            future.timing = _timing_of(future, timer or future._timer)
            future.set_result(images)
        else:
            future.set_exception(outcome or _closed_error())

    def _left(self) -> None:
        if self._governor is not None:
            self._governor.left(self._clock())

    def _busy(self) -> BusyError:
        each = statistics.median(self._durations) if self._durations else 0.0
        retry_after_s = max(1.0, each * len(self._waiting) / len(self._samplers))
        return BusyError(
            f"the queue is full: {len(self._waiting)} requests wait: expected fewer than {self.capacity}: try again in "
            f"{math.ceil(retry_after_s)} s",
            retry_after_s,
        )


class _Stop(OTCacheError):
    """Ends a running request from its step callback; never seen outside."""


def _closed_error() -> ClosedError:
    return ClosedError("the service is closed: received a request: expected an open one: start it again")


def _minimum_budget(budgets: Sequence[str], wanted: int | str | None, minimum: int | str | None) -> str | None:
    """The lowest of the artifact's budgets that a request may be served at; None for any. Raises RequestError."""
    if minimum is None:
        return FULL if wanted == FULL else None
    most = len(budgets) if wanted is None else budgets.index(str(wanted)) + 1
    if str(minimum) not in budgets[:most]:
        raise RequestError(
            f"minimum_budget is {one_line(repr(minimum), 40)}: expected one of {', '.join(budgets[:most])}: at most "
            "the budget that is asked for"
        )
    return str(minimum)


def _timing_of(future: PictureFuture, timer: Timer) -> Timing:
    """Of a request that ran alone what its timer says; else the batch's, after its own time in the queue."""
    timing = timer.timing()
    if timer is future._timer:
        return timing
    waited_s = future._timer.timing().parts["wait"]
    parts = {**timing.parts, "wait": timing.parts["wait"] + waited_s}
    return dataclasses.replace(timing, total_s=timing.total_s + waited_s, parts=parts)


def _request_at(future: PictureFuture) -> Request:
    """What was asked for, at the budget that is served."""
    return future.request if future.budget is None else future.request.at_budget(future.budget)


def _check_timeout(timeout_s: Any) -> None:
    if not _is_seconds(timeout_s) or not timeout_s > 0:
        raise UsageError(f"timeout_s is {one_line(repr(timeout_s), 40)}: expected seconds above 0")


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
