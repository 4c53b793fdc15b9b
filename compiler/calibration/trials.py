"""Try schedules on the calibration set: fit each one's program in closed loop, decode what comes out, score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcache.schemas.manifest import Candidate
from otcache.schemas.program import Program

from ..graph.stages import Stages
from ..options import Objective
from ..pipelines.denoiser import Denoiser
from ..pipelines.trajectory import Trajectory
from ..programs.solver_table import SolverTable, extrapolated_jump
from ..workspace.ledger import Attempts
from . import metrics
from .fit import fit_output_program
from .rollout import roll_out

Schedule = tuple[int, ...]
PRIOR_ORDER = 1
"""Adams–Bashforth weights: what the fit falls back to where the data say nothing."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A program that was rolled out on the calibration set. Higher scores are better."""

    name: str
    program: Program
    schedule: Schedule
    psnr_db: float
    ssim: float
    score: float
    weight: float | None = None

    def named(self, name: str, weight: float | None) -> Trial:
        """The same measurement under the name of another way that led to its schedule."""
        return replace(self, name=name, weight=weight)

    def candidate(self, chosen: bool) -> Candidate:
        return Candidate(
            name=self.name,
            payload=self.program.payload,
            schedule=self.schedule,
            weight=self.weight,
            psnr_db=self.psnr_db,
            ssim=self.ssim,
            chosen=chosen,
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration set with all that is needed to try a schedule on it."""

    denoiser: Denoiser
    trajectory: Trajectory
    table: SolverTable
    decode: Callable[[Tensor], np.ndarray]
    """Latents (n, …) → pictures float32 (n, height, width, 3) in [0, 1]."""
    references: np.ndarray
    objective: Objective
    stages: Stages | None = None
    lpips: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    memory: int = 4
    penalty: float = 1e-5
    fitted: dict[Schedule, Trial] = field(default_factory=dict)
    attempts: Attempts = field(default_factory=Attempts)

    def fit(self, schedule: Sequence[int], name: str = "", weight: float | None = None) -> Trial:
        """The `output` program of a schedule; a schedule that was fitted before is not rolled out again."""
        schedule = tuple(int(index) for index in schedule)

        def fitted() -> Trial:
            program, latents = fit_output_program(
                self._denoise,
                self.trajectory,
                schedule,
                self._prior,
                timesteps=self.table.timesteps,
                input_scales=self.table.input_scales,
                memory=self.memory,
                penalty=self.penalty,
            )
            return self._scored(name, program, schedule, latents, weight)

        if schedule not in self.fitted:
            self.fitted[schedule] = self.attempt(["output, banded", list(schedule)], fitted)
        return self.fitted[schedule].named(name, weight)

    def attempt(self, key: Any, measure: Callable[[], Trial]) -> Trial:
        """`measure()`, or what it came to in an earlier compile of the same model and calibration set."""
        counter = self.denoiser.evaluations
        return trial_from_json(self.attempts.get(key, counter, lambda: json_from_trial(measure())))

    def try_program(self, name: str, program: Program) -> Trial:
        """Roll out a program as it is."""
        latents = roll_out(program, self.denoiser, self.trajectory.latents[0], self.stages)
        return self._scored(name, program, program.schedule, latents, None)

    def _denoise(self, latents: Tensor, step_index: int) -> Tensor:
        latents = torch.as_tensor(latents).float()
        return self.denoiser(
            latents, float(self.table.timesteps[step_index]), float(self.table.input_scales[step_index])
        )

    def _prior(self, computed: Sequence[int], end: int) -> tuple[float, np.ndarray]:
        return extrapolated_jump(self.table, computed, end, PRIOR_ORDER)

    def _scored(self, name: str, program: Program, schedule: Schedule, latents: Tensor, weight: float | None) -> Trial:
        pictures = self.decode(latents)
        psnr_db = float(metrics.psnr(pictures, self.references).mean())
        ssim = float(metrics.ssim(pictures, self.references).mean())
        if self.objective == "lpips" and self.lpips is not None:
            score = -float(self.lpips(pictures, self.references).mean())
        else:
            score = psnr_db if self.objective == "psnr" else ssim
        return Trial(
            name=name, program=program, schedule=schedule, psnr_db=psnr_db, ssim=ssim, score=score, weight=weight
        )


def json_from_trial(trial: Trial) -> dict[str, Any]:
    """A JSON value that `trial_from_json` reads back."""
    return {**asdict(trial), "program": trial.program.model_dump(mode="json")}


def trial_from_json(fields: dict[str, Any]) -> Trial:
    """The inverse of `json_from_trial`."""
    return Trial(
        **{**fields, "program": Program.model_validate(fields["program"]), "schedule": tuple(fields["schedule"])}
    )
