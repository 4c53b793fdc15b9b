"""What `otc compare` asks of a method: final latents on the same prompts and seeds, and what they cost.

Shapes: n held-out prompts, latents (n, …) as the scheduler sees them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from otcache.schemas.program import Program

from ..calibration.outcomes import Evaluation
from ..calibration.rollout import StagedModel, roll_out
from ..calibration.trials import Calibration
from ..pipelines.call import CallOptions
from ..pipelines.denoiser import denoiser_of
from ..pipelines.trajectory import Trajectory
from ..programs.solver_table import SolverTable
from ..workspace.workspace import Workspace
from .cells import Group


class NotApplicable(Exception):
    """A method cannot run on this model or at this budget; the text says why, and reports show it."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every method is given: the model, its full sampler, a calibration set, and held-out prompts with full runs."""

    pipeline: Any
    call: CallOptions
    table: SolverTable
    calibration: Calibration
    evaluation: Evaluation
    prompts: tuple[str, ...]
    """Held-out, in the order of `evaluation`'s samples."""
    seeds: tuple[int, ...]
    calibration_prompts: tuple[str, ...]
    calibration_seeds: tuple[int, ...]
    guidance_scale: float
    workspace: Workspace
    key: Any
    """What everything above depends on, for the workspace."""
    set_timesteps: Callable[[Any, int], None]
    seed: int = 0

    @property
    def count(self) -> int:
        return len(self.prompts)

    def prompts_of(self, trajectory: Trajectory) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Prompts and seeds of one of the two sets."""
        if trajectory is self.evaluation.trajectory:
            return self.prompts, self.seeds
        return self.calibration_prompts, self.calibration_seeds


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method at one budget."""

    latents: Tensor
    nfe: np.ndarray
    """Full runs of the blocks for each prompt, float64 (n,)."""
    setting: str
    """What was chosen for this budget: a schedule, a threshold."""
    seconds: float
    """Wall time of one picture's sampling alone, batch 1: the median of two."""
    full_runs: float = 0.0
    """Model evaluations that preparing this budget took, in full runs per prompt that it used; searches only."""


class Method(Protocol):
    """A way to sample with about `budget` evaluations instead of all."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> Group: ...

    @property
    def source(self) -> str:
        """Paper or library."""

    @property
    def adaptive(self) -> bool:
        """Whether evaluations differ between prompts."""

    def run(self, bench: Bench, budget: int) -> Outcome:
        """Raises NotApplicable."""


@dataclass(frozen=True, kw_only=True)
class ProgramMethod:
    """A method that comes down to coefficients."""

    name: str
    group: Group
    source: str
    build: Callable[[Bench, int], Program | tuple[Program, str, float]]
    """(bench, budget) → program; or with a setting to show and the full runs that it took to find."""
    staged: Callable[[Bench, Evaluation], StagedModel] | None = None
    """The staged model that runs a residual program, if not the usual one."""
    adaptive: bool = False
    made_of: Mapping[int, Program] = field(default_factory=dict)
    """Programs by budget, of a method that depends on more than the bench."""

    def run(self, bench: Bench, budget: int) -> Outcome:
        built = self.build(bench, budget)
        program, setting, full_runs = built if isinstance(built, tuple) else (built, "", 0.0)
        latents = self._roll_out(bench, bench.evaluation, program)
        times = []
        for index in range(min(2, bench.count)):
            single = only(bench.evaluation, index)
            start = time.perf_counter()
            self._roll_out(bench, single, program)
            times.append(time.perf_counter() - start)
        return Outcome(
            latents=latents,
            nfe=np.full(bench.count, float(program.nfe)),
            setting=setting or schedule_text(program.schedule),
            seconds=float(np.median(times)),
            full_runs=full_runs,
        )

    def _roll_out(self, bench: Bench, evaluation: Evaluation, program: Program) -> Tensor:
        staged = self.staged(bench, evaluation) if self.staged else None
        return roll_out(program, evaluation.denoiser, evaluation.trajectory.latents[0], evaluation.stages, staged)


def only(evaluation: Evaluation, index: int) -> Evaluation:
    """An evaluation of one of its samples."""
    one = evaluation.trajectory.rows(slice(index, index + 1))
    return replace(
        evaluation,
        trajectory=one,
        references=evaluation.references[index : index + 1],
        denoiser=denoiser_of(evaluation.denoiser.transformer, evaluation.denoiser.interface, one),
    )


def schedule_text(schedule: tuple[int, ...]) -> str:
    return " ".join(map(str, schedule))
