"""The seam between tensors and decisions: a set of samples that answers with a few numbers for each of them.

Searches, fits and comparisons see `Samples` only. Tensors stay where they were made: `local.LocalSamples` holds them in
mapped files and works on one micro-batch after the other on one device; a `Fleet` is several sets as one. Answers have
one row a sample, in the samples' order, so that sums over samples do not depend on who computed what.

Shapes: n samples, T steps, r regressors of a step: latents, the outputs that it weighs, and the means of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .batch import Batch
from .runs import FloatArray

Rows = dict[str, NDArray[Any]]
"""Named arrays with one row a sample."""
Each = Callable[..., Iterable[Any]]
"""As `map`: what a function answers for each of several, in their order; one after the other, or all at once."""


@dataclass(frozen=True, kw_only=True)
class StepStatistics:
    """What a fit needs to know of a computed step: inner products of what it weighs, for each sample."""

    gram: FloatArray
    """(n, r, r) of the regressors: latents and outputs, newest last, and then the means of each of them."""
    cross: FloatArray
    """(n, r) of the regressors with what the prior leaves of the target."""
    distance: FloatArray
    """(n,) ‖x − X‖ of the latents from the full run's at this step."""
    size: FloatArray
    """(n,) ‖X‖."""
    change: FloatArray | None
    """(n,) how much the output changed since the one before (`programs.update.log_change`); None at the first."""
    evaluations: int
    """Model evaluations that were made for this, of one sample each."""


class Walk(Protocol):
    """A schedule walked step by step by all samples, each with coefficients of its own."""

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """Evaluate the model where the samples are, and compare what a step to `following` can reach with the full run.

        Args:
            step_index: where the samples are.
            following: where they go, at most T.
            prior: coefficients (1 + outputs,) of latents and outputs that the step would take without a fit.
        """

    def advance(self, coefs: FloatArray) -> None:
        """Take the step, with coefficients (n, r)."""

    def finish(self) -> Rows:
        """Scores of the pictures that the samples have come to (`scoring.scores_from_latents`); the walk is closed."""

    def close(self) -> None:
        """Give back what the walk holds."""


class Samples(Protocol):
    """A set of samples with their full runs."""

    @property
    def count(self) -> int:
        """n."""

    @property
    def elements(self) -> int:
        """Numbers of one sample's latents."""

    @property
    def caches_residuals(self) -> bool:
        """Whether the model has blocks whose residuals can be cached, and was cut."""

    def trajectory_gram(self) -> FloatArray:
        """Inner products float64 (n, 2T+1, 2T+1) of X_0 … X_T, V_0 … V_{T−1}."""

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """What `function` answers for each micro-batch of the samples `rows`, one after the other.

        A function that keeps something beside the samples for later ones has a true attribute `keeps`.
        """

    def walk(self, memory: int) -> Walk:
        """A walk that starts at the full runs' first latents and weighs at most so many outputs."""

    def close(self) -> None:
        """Give back what the set holds; nothing can be asked afterwards."""


class Fleet:
    """Several sets of samples as one: their samples one after the other, in the order of the members.

    Answers are those of one set, to the bit, where members begin at multiples of the micro-batch, and `map` is asked
    for samples from the first on, or for a single one: no batch then goes across members.
    """

    def __init__(self, members: Sequence[Samples], each: Each = map) -> None:
        """`each`: asks the members."""
        self.members, self.each = tuple(members), each
        counts = [member.count for member in self.members]
        ends = np.cumsum(counts).tolist()
        self.parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def count(self) -> int:
        """n, of all members."""
        return self.parts[-1].stop

    @property
    def elements(self) -> int:
        """See `Samples`."""
        return self.members[0].elements

    @property
    def caches_residuals(self) -> bool:
        """See `Samples`."""
        return all(member.caches_residuals for member in self.members)

    def trajectory_gram(self) -> FloatArray:
        """See `Samples`."""
        return np.concatenate(list(self.each(lambda member: member.trajectory_gram(), self.members)))

    def map(self, function: Callable[[Batch], Rows], rows: slice = slice(None)) -> Rows:
        """See `Samples`. A batch's `rows` are those of its member, its `places` those of the fleet."""
        start, stop, _ = rows.indices(self.count)
        asked = [
            (member, slice(max(start - part.start, 0), min(stop, part.stop) - part.start))
            for member, part in zip(self.members, self.parts, strict=True)
            if start < part.stop and stop > part.start
        ]
        return _joined(self.each(lambda member, own: member.map(function, own), *zip(*asked, strict=True)))

    def walk(self, memory: int) -> Walk:
        """See `Samples`."""
        return FleetWalk([member.walk(memory) for member in self.members], self.parts, self.each)

    def close(self) -> None:
        """See `Samples`."""
        for member in self.members:
            member.close()


class FleetWalk:
    """The walks of a fleet's members as one."""

    def __init__(self, walks: Sequence[Walk], parts: Sequence[slice], each: Each = map) -> None:
        self.walks, self.parts, self.each = walks, parts, each

    def compute(self, step_index: int, following: int, prior: FloatArray) -> StepStatistics:
        """See `Walk`."""
        found = list(self.each(lambda walk: walk.compute(step_index, following, prior), self.walks))
        changes = [each.change for each in found if each.change is not None]
        return StepStatistics(
            gram=np.concatenate([each.gram for each in found]),
            cross=np.concatenate([each.cross for each in found]),
            distance=np.concatenate([each.distance for each in found]),
            size=np.concatenate([each.size for each in found]),
            change=np.concatenate(changes) if changes else None,
            evaluations=sum(each.evaluations for each in found),
        )

    def advance(self, coefs: FloatArray) -> None:
        """See `Walk`."""
        own = [coefs[part] for part in self.parts]
        list(self.each(lambda walk, part: walk.advance(part), self.walks, own))

    def finish(self) -> Rows:
        """See `Walk`."""
        return _joined(self.each(lambda walk: walk.finish(), self.walks))

    def close(self) -> None:
        """See `Walk`."""
        for walk in self.walks:
            walk.close()


def _joined(answers: Iterable[Rows]) -> Rows:
    found = list(answers)
    return {name: np.concatenate([answer[name] for answer in found]) for name in found[0]}
