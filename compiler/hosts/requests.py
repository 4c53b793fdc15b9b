"""The running requests of residual programs: which one a call of a transformer belongs to, and what its blocks have kept.

A request is born in `ResidualScheduler.set_timesteps`, belongs to that scheduler and to the thread that called it, and dies with
its last step, with the scheduler's next request, or with the scheduler. Nothing is kept on the transformer: pipelines that share
one find their own request through their thread and through the time that they call the transformer with.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from otcache.schemas.program import Step

from .recipe import Recipe

TIME_TOLERANCE = 2.0**-7
"""Relative: pipelines hand times over in the model's type, and bfloat16 has eight bits."""


class Branch:
    """What the blocks keep between the steps of a request, for one branch of guidance: residuals float32, newest last."""

    def __init__(self) -> None:
        self.residuals: list[Tensor] = []
        self.source: Tensor | None = None
        """The hidden states before the blocks, in the call that is running."""


class Request:
    """One call of a pipeline."""

    def __init__(self, recipe: Recipe, transformer: nn.Module) -> None:
        self.recipe, self.transformer = recipe, transformer
        self.position = 0
        self.calls: Counter[str] = Counter()
        """Calls of the transformer in this step, by the name of their cache context."""
        self._branches: dict[tuple[str, int], Branch] = {}

    @property
    def step(self) -> Step:
        return self.recipe.program.steps[self.position]

    def expects(self, time: float) -> bool:
        """Whether the transformer would be called with this time now."""
        expected = self.step.timestep * self.recipe.timestep_scale
        return abs(time - expected) <= TIME_TOLERANCE * abs(expected)

    def branch(self, context: str) -> Branch:
        """The branch of the transformer's next call: pipelines name their branches, or call them in a fixed order."""
        key = (context, self.calls[context])
        self.calls[context] += 1
        return self._branches.setdefault(key, Branch())

    def advance(self) -> bool:
        """Go to the next step; False after the last one."""
        self.calls.clear()
        self.position += 1
        return self.position < len(self.recipe.program.steps)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.requests: list[weakref.ref[Request]] = []
        """Oldest first."""
        self.call: tuple[Request, Branch] | None = None


_thread = _Thread()


def open_request(request: Request) -> None:
    """Add a request of this thread. It is forgotten when its owner lets go of it."""
    _thread.requests = [one for one in _thread.requests if one() is not None]
    _thread.requests.append(weakref.ref(request))


def request_of(transformer: nn.Module, time: float) -> Request | None:
    """The newest request of this thread whose next call of the transformer has this time."""
    living = [one() for one in reversed(_thread.requests)]
    return next((one for one in living if one and one.transformer is transformer and one.expects(time)), None)


@contextmanager
def call_of(request: Request, context: str) -> Iterator[None]:
    """The transformer runs for a request, which the hooks of its blocks then find."""
    before, _thread.call = _thread.call, (request, request.branch(context))
    try:
        yield
    finally:
        _thread.call[1].source = None
        _thread.call = before


def running_call() -> tuple[Request, Branch] | None:
    """The request, and its branch, that the transformer runs for in this thread."""
    return _thread.call
