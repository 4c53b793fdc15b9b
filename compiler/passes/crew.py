"""Who makes full runs and holds samples in place of this process: what passes ask of a crew of workers.

Passes know these protocols alone. A crew (`fleet.crew`) loads the model elsewhere, makes full runs there and answers as
`Samples` do, so that what follows from the answers is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.runs import Runs
from ..calibration.samples import Samples
from ..workspace.progress import Pass


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Which full runs belong together: n prompts at consecutive seeds."""

    name: str
    """Of the pass that makes them."""
    prompts: tuple[str, ...]
    """One for each sample."""
    seed: int
    """Of the first sample."""
    margin: float = 1.0
    """See `capture.calibration_scales`."""

    @property
    def count(self) -> int:
        """n."""
        return len(self.prompts)


class RunsElsewhere(Protocol):
    """Full runs that a crew holds: what passes read of `Runs`, for a few samples, and the samples themselves."""

    @property
    def count(self) -> int:
        """n."""

    @property
    def num_inference_steps(self) -> int:
        """T."""

    @property
    def timesteps(self) -> Sequence[float]:
        """Of the full sampler, (T,)."""

    def latents(self, rows: slice, step_index: int) -> NDArray[np.float32]:
        """See `Runs`."""

    def conditioning(self, rows: slice) -> Mapping[str, Tensor]:
        """See `Runs`."""

    def guidance(self, rows: slice) -> NDArray[np.float32]:
        """See `Runs`."""

    def samples(self, *, cut: bool, lpips: bool) -> Samples:
        """The runs with the model.

        Args:
            cut: with its stages, which programs of residuals run.
            lpips: measure LPIPS of pictures as well.
        """


AnyRuns = Runs | RunsElsewhere
"""Here, or at a crew's."""


class Crew(Protocol):
    """Workers that make full runs and hold samples."""

    def full_runs(self, session: Any, wanted: SampleSet, advance: Pass) -> RunsElsewhere:
        """Full runs of a set, made by the workers that will hold them.

        Args:
            session: a `session.Session`, which has its crew.
            wanted: the set.
            advance: told of evaluations.
        """


def key_differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two calibration keys, with the value of each.

    >>> key_differences({"weights": "sha256:1", "seed": 0}, {"weights": "sha256:2", "seed": 0})
    ["weights ('sha256:1' here, 'sha256:2' there)"]
    """
    found: list[str] = []
    for name in sorted({*own, *other}):
        here, there = own.get(name), other.get(name)
        if here == there:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += [f"{name}: {each}" for each in key_differences(here, there)]
        else:
            found.append(f"{name} ({here!r} here, {there!r} there)")
    return found
