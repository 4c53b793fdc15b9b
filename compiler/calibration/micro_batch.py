"""How many samples are evaluated at once, and what happens where the device has no memory for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from otcache.schemas.errors import HostError

from ..pipelines.out_of_memory import error_without_memory, is_out_of_memory, release

Notify = Callable[[str], None]
Answer = TypeVar("Answer")


class MicroBatch:
    """How many samples are evaluated at once; halved, with a note, where the device has no memory for them."""

    def __init__(self, size: int, note: Notify = lambda text: None) -> None:
        self.size, self.note = size, note

    def run(
        self, rows: slice, compute: Callable[[slice], Answer], device: torch.device, at_once: int = 0
    ) -> Iterator[tuple[slice, Answer]]:
        """(samples, what `compute` answers for them), one micro-batch of the samples `rows` after the other.

        Args:
            rows: with a start and a stop.
            compute: asked again, for fewer samples, where memory was not enough.
            device: whose cached memory is given back before that.
            at_once: samples to begin with, if not `size`.

        Raises HostError where not even one sample fits.
        """
        start = rows.start
        while start < rows.stop:
            part = slice(start, min(start + (at_once or self.size), rows.stop))
            failure: Exception | None = None
            try:
                answer = compute(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)
            if failure is not None:  # outside of the handler, whose traceback keeps the tensors
                self.halve(failure, part.stop - part.start)
                at_once = 0
                release(device)
                continue
            yield part, answer
            start = part.stop

    def halve(self, error: Exception, tried: int) -> None:
        """Go on with at most half as many samples as were `tried`. Raises HostError where that was one."""
        if tried == 1:
            cause = error.__cause__ if isinstance(error, HostError) else None
            error = cause if isinstance(cause, Exception) else error
            raise error_without_memory("one sample at a time", error) from error
        self.size = min(self.size, tried // 2)
        self.note(f"out of memory on the device: going on with {self.size} samples at a time")
