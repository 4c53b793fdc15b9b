"""Samples that a worker holds, as passes and searches see them (`Samples`, `Walk`), with what it takes to make them
again where the worker dies.

A set is held by a name. Whoever asks says first what the worker has to know (`_bring`): nothing, if it is the one that
was asked before; if it is another one, the set itself, what functions had kept beside it, and the steps of the walk.
Evaluations are functions of samples and micro-batches alone, so that answers are the same to the bit.
"""

from __future__ import annotations

import itertools
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.batch import Batch
from ..calibration.runs import FloatArray
from ..calibration.samples import Each, Fleet, Rows, Samples, StepStatistics
from .packing import pack
from .worker import Holding

Answer = TypeVar("Answer")
_names = itertools.count()


class Post(Protocol):
    """A place that a worker fills, and another one when it has died."""

    def on_worker(self, answer: Callable[[Any], Answer]) -> Answer:
        """What `answer` makes of the worker; asked again with another one where it dies meanwhile."""

    def ask(self, worker: Any, kind: str, method: str, data: bytes, sample_steps: int) -> Any:
        """What a worker answers; raises what it raised, or what says that it is gone."""

    def tell(self, worker: Any, method: str, data: bytes) -> None:
        """Have a worker do something when it comes to it; nobody waits for it."""


class Member:
    """See `Samples`."""

    def __init__(self, post: Post, holding: Holding, shared: dict[str, Any], steps: int) -> None:
        """`shared`: see `packing.pack`. `steps`: T."""
        self.post, self.holding, self.shared, self.steps = post, holding, shared, steps
        self.name = f"set {next(_names)}"
        self.worker: Any = None
        self.kept: dict[bytes, None] = {}
        """Questions to functions that keep something, in their order."""
        self.facts: dict[str, Any] = {}
        self._held_by: list[Any] = []
        self._drop = weakref.finalize(self, _drop, post, self.name, self._held_by)
        self._drop.atexit = False  # all workers end then
        self.post.on_worker(self._bring)

    @property
    def count(self) -> int:
        """See `Samples`."""
        start, stop = self.holding.rows
        return stop - start

    @property
    def elements(self) -> int:
        """See `Samples`."""
        return int(self.facts["elements"])

    @property
    def caches_residuals(self) -> bool:
        """See `Samples`."""
        return bool(self.facts["caches_residuals"])

    def trajectory_gram(self) -> FloatArray:
        """See `Samples`."""
        found: FloatArray = self.ask("gram", "gram", pack(self.name, {}), self.count * self.steps)
        return found

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """See `Samples`."""
        start, stop, _ = rows.indices(self.count)
        question = pack((function, (start, stop)), self.shared)
        found: Rows = self.ask("map", "map", pickle.dumps((self.name, question)), stop - start)
        if getattr(function, "keeps", False):
            self.kept[question] = None
        return found

    def walk(self, memory: int) -> MemberWalk:
        """See `Samples`."""
        return MemberWalk(self, memory)

    def close(self) -> None:
        """See `Samples`."""
        self._drop()

    def ask(self, kind: str, method: str, data: bytes, sample_steps: int) -> Any:
        """A question about the set."""

        def answer(worker: Any) -> Any:
            self._bring(worker)
            return self.post.ask(worker, kind, method, data, sample_steps)

        return self.post.on_worker(answer)

    def _bring(self, worker: Any) -> None:
        if worker is self.worker:
            return
        self.facts = self.post.ask(worker, "hold", "hold", pack((self.name, self.holding), {}), 0)
        for question in self.kept:
            self.post.ask(worker, "again", "map", pickle.dumps((self.name, question)), self.count)
        self.worker, self._held_by[:] = worker, [worker]


def _drop(post: Post, name: str, held_by: list[Any]) -> None:
    """Have a worker give back what it holds of a set that nobody asks any more."""
    for worker in held_by:
        post.tell(worker, "drop", pack(name, {}))


class MemberWalk:
    """See `samples.Walk`."""

    def __init__(self, member: Member, memory: int) -> None:
        self.member, self.memory = member, memory
        self.name = f"walk {next(_names)}"
        self.worker: Any = None
        self.taken: list[bytes] = []
        """What it was asked so far."""

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """See `samples.Walk`."""
        found: StepStatistics = self._ask("compute", step_index, following, prior)
        return found

    def advance(self, coefs: FloatArray) -> None:
        """See `samples.Walk`."""
        self._ask("advance", np.ascontiguousarray(coefs))

    def finish(self) -> Rows:
        """See `samples.Walk`."""
        found: Rows = self._ask("finish")
        return found

    def close(self) -> None:
        """See `samples.Walk`."""
        if self.worker is not None:
            self.member.post.tell(self.worker, "step", pack((self.name, "close", ()), {}))

    def _ask(self, method: str, *arguments: Any) -> Any:
        data = pack((self.name, method, arguments), {})
        post, count = self.member.post, self.member.count

        def answer(worker: Any) -> Any:
            self._bring(worker)
            return post.ask(worker, "walk", "step", data, count if method in ("compute", "finish") else 0)

        found = post.on_worker(answer)
        self.taken.append(data)
        return found

    def _bring(self, worker: Any) -> None:
        self.member._bring(worker)
        if worker is self.worker:
            return
        post = self.member.post
        post.ask(worker, "walk", "walk", pack((self.name, self.member.name, self.memory), {}), 0)
        for data in self.taken:
            post.ask(worker, "again", "step", data, self.member.count)
        self.worker = worker


class HeldRuns:
    """See `passes.crew.RunsElsewhere`."""

    def __init__(self, members: Callable[..., Sequence[Member]], each: Each, timesteps: Sequence[float]) -> None:
        """`members`: with `cut` and `lpips`, new sets of the runs' samples, in their order."""
        self.members, self.each, self.timesteps = members, each, tuple(timesteps)
        self._plain: Fleet | None = None

    @property
    def plain(self) -> Fleet:
        """The samples without anything that is not in the runs."""
        if self._plain is None:
            self._plain = Fleet(self.members(cut=False, lpips=False), self.each)
        return self._plain

    @property
    def count(self) -> int:
        """See `RunsElsewhere`."""
        return self.plain.count

    @property
    def num_inference_steps(self) -> int:
        """See `RunsElsewhere`."""
        return len(self.timesteps)

    def latents(self, rows: slice, step_index: int) -> NDArray[np.float32]:
        """See `RunsElsewhere`."""
        found: NDArray[np.float32] = self.plain.map(_latents_of(step_index), rows)["latents"]
        return found

    def guidance(self, rows: slice) -> NDArray[np.float32]:
        """See `RunsElsewhere`."""
        found: NDArray[np.float32] = self.plain.map(_guidance_of, rows)["guidance"]
        return found

    def conditioning(self, rows: slice) -> dict[str, Tensor]:
        """See `RunsElsewhere`."""
        import torch

        parts = self.plain.map(_conditioning_of, rows)["conditioning"]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def samples(self, *, cut: bool, lpips: bool) -> Samples:
        """See `RunsElsewhere`."""
        return Fleet(self.members(cut=cut, lpips=lpips), self.each)


def _latents_of(step_index: int) -> Callable[[Batch], Rows]:
    return lambda batch: {"latents": batch.runs.latents(batch.rows, step_index)}


def _guidance_of(batch: Batch) -> Rows:
    return {"guidance": batch.runs.guidance(batch.rows)}


def _conditioning_of(batch: Batch) -> Rows:
    """One mapping of tensors for the batch, whose types NumPy may not know."""
    found = np.empty(1, dtype=object)
    found[0] = batch.runs.conditioning(batch.rows)
    return {"conditioning": found}
