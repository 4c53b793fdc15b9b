"""The request that a call of a transformer belongs to, and what its blocks keep from step to step.

Pipelines may share a transformer, in several threads or one inside the other (from a callback). So nothing is kept on
the transformer: a request belongs to the scheduler of its pipeline, which `calls` finds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from otcache.schemas.program import Program, Step

from .recipe import Recipe


class Branch:
    """What the blocks keep between the steps of a request, for one branch of guidance: residuals float32, newest
    last.
    """

    def __init__(self) -> None:
        self.residuals: list[Tensor] = []
        self.source: Tensor | None = None
        """The hidden states before the blocks, in the call that is running."""


class Request:
    """One call of a pipeline, from `set_timesteps` to the last step."""

    def __init__(self, recipe: Recipe, program: Program) -> None:
        self.recipe, self.program = recipe, program
        self.position = 0
        self.calls: Counter[str] = Counter()
        """Calls of the transformer in this step, by the name of their cache context."""
        self._branches: dict[tuple[str, int], Branch] = {}

    @property
    def step(self) -> Step:
        return self.program.steps[self.position]

    def branch(self, context: str) -> Branch:
        """The branch of the transformer's next call: pipelines name their branches, or call them in a fixed order."""
        key = (context, self.calls[context])
        self.calls[context] += 1
        return self._branches.setdefault(key, Branch())

    def advance(self) -> bool:
        """Go to the next step; False after the last one."""
        self.calls.clear()
        self.position += 1
        return self.position < len(self.program.steps)


class _Thread(threading.local):
    call: tuple[Request, Branch] | None = None


_thread = _Thread()


@contextmanager
def call_of(request: Request | None, context: str) -> Iterator[None]:
    """The transformer runs for a request, which the hooks of its blocks then find; or for none."""
    before, call = _thread.call, None if request is None else (request, request.branch(context))
    _thread.call = call
    try:
        yield
    finally:
        _thread.call = before
        if call is not None:
            call[1].source = None


def running_call() -> tuple[Request, Branch] | None:
    """The request, and its branch, that the transformer runs for in this thread."""
    return _thread.call
