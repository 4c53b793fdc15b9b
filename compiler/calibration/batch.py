"""A few samples on the device where the model is: all that is computed of tensors is a function of a `Batch`.

Shapes: m samples of one micro-batch; latents (m, …) as the scheduler sees them, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..graph.stages import Stages
from ..pipelines.denoiser import Denoiser
from ..pipelines.interface import Interface
from ..programs.solver_table import SolverTable
from .runs import Runs

Decode = Callable[[Tensor], NDArray[np.float32]]
"""Final latents (m, …) → pictures float32 (m, [frames,] height, width, 3) in [0, 1]."""
Lpips = Callable[[Any, Any], NDArray[np.float64]]
"""(pictures, references) → (m,)."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A model on its device, as all samples of a set share it."""

    transformer: Any
    interface: Interface
    """With its constants on the device."""
    device: torch.device
    decode: Decode
    table: SolverTable
    """The full sampler."""
    stages: Stages | None = None
    """Of the cut, on the device: what residual programs run. None where the model was not cut."""
    lpips: Lpips | None = None
    evaluated: Callable[[int], None] = lambda count: None
    """Told of the samples of every evaluation that was made."""

    @property
    def caches_residuals(self) -> bool:
        """Whether there are stages whose blocks turn a tensor into one of its shape."""
        return self.stages is not None and bool(self.stages.features)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some samples of a set of full runs, with the model."""

    rows: slice
    """Which of the set's samples these are."""
    runs: Runs
    evaluator: Evaluator
    denoiser: Denoiser
    scratch: Path
    """A folder that lives as long as the set, for what is kept of a sample between two answers."""
    first: int = 0
    """Place of the set's first sample where the set is a part of a larger one (`samples.Fleet`)."""

    @property
    def count(self) -> int:
        """m."""
        return self.rows.stop - self.rows.start

    @property
    def places(self) -> range:
        """Of these samples in the whole set: which of all prompts and seeds they are."""
        return range(self.first + self.rows.start, self.first + self.rows.stop)

    def latents(self, step_index: int) -> Tensor:
        """The full run's X_i, float32 (m, …); −1 is the last."""
        return self.tensor(self.runs.latents(self.rows, step_index))

    def first_output(self) -> Tensor:
        """The full run's V_0, float32 (m, …)."""
        return self.tensor(self.runs.first_output(self.rows))

    def references(self, part: slice = slice(None)) -> NDArray[np.float32]:
        """The full run's pictures of some of the batch's samples, float32 (m, [frames,] height, width, 3); to be read
        only.
        """
        start, stop, _ = part.indices(self.count)
        return self.runs.pictures(slice(self.rows.start + start, self.rows.start + stop))

    def decode(self, latents: Tensor) -> NDArray[np.float32]:
        """Pictures of final latents (m, …)."""
        return self.evaluator.decode(latents)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """An array on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.evaluator.device)


def batch_from_rows(runs: Runs, evaluator: Evaluator, rows: slice, scratch: Path, first: int = 0) -> Batch:
    """The samples `rows`, with their conditioning and guidance on the device."""
    conditioning = {name: value.to(evaluator.device) for name, value in runs.conditioning(rows).items()}
    guidance = torch.from_numpy(runs.guidance(rows)).to(evaluator.device)
    denoiser = Denoiser(
        transformer=evaluator.transformer,
        interface=evaluator.interface,
        conditioning=conditioning,
        guidance=guidance,
        evaluated=evaluator.evaluated,
    )
    return Batch(rows=rows, runs=runs, evaluator=evaluator, denoiser=denoiser, scratch=scratch, first=first)
