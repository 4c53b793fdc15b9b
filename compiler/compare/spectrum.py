"""Spectrum (arXiv 2603.01623): the blocks' output forecast by a ridge regression on Chebyshev polynomials in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from otcache.schemas.program import Program

from ..calibration.rollout import StagedModel
from ..graph.stages import Stages
from ..pipelines.denoiser import Denoiser
from ..programs.forecasts import forecast_coefs
from ..programs.solver_table import SolverTable
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text
from .residual_forecasts import forecast_program

HISTORY = 64
"""Computed features that a forecast weighs at most: a program's limit; the release keeps 100."""
TIMELINE = 50
"""Steps that the release maps to [−1, 1], however many there are."""
BLENDS = (0.5, 0.75, 1.0)
"""Weights of the spectral forecast against a local difference: 1 is the paper's, 0.5 to 1 what the release recommends.
"""
WARMUP, WINDOW = 5, 2.0
"""As released; the growth of the window is what users choose a speed by."""
OTHERS = 12
"""Schedules with other warm-ups and windows that are tried."""


class FeatureModel(StagedModel):
    """Forecasts what the blocks put out, rather than what they add, as Spectrum and TaylorSeer's lite form do."""

    def __init__(self, stages: Stages, denoiser: Denoiser) -> None:
        super().__init__(stages, denoiser, keep=HISTORY)

    def _bridge(self, values: dict[str, Tensor], step: Any) -> None:
        results = [result for _, result in self.stages.features]
        if step.compute:
            self.residuals.append({name: values[name] for name in results})
            self.residuals = self.residuals[-self.keep :]
            return
        recent = self.residuals[-len(step.residual_coefs) :]
        for name in results:
            values[name] = sum(coef * kept[name] for coef, kept in zip(step.residual_coefs, recent, strict=True))  # type: ignore[assignment]


def chebyshev_coefs(computed: Sequence[int], step_index: int, *, degree: int = 4, penalty: float = 0.1) -> np.ndarray:
    """Weights float64 (len(computed),) of computed features in Spectrum's spectral forecast (arXiv 2603.01623).

    Ridge regression on Chebyshev polynomials T_0 … T_degree of τ = 2t/50 − 1; degree and penalty as released.
    """

    def design(steps: Sequence[int]) -> np.ndarray:
        tau = 2.0 * np.asarray(steps, dtype=np.float64) / TIMELINE - 1.0
        return np.polynomial.chebyshev.chebvander(tau, degree)

    basis = design(computed)
    normal = basis.T @ basis + penalty * np.eye(degree + 1)
    return (design([step_index]) @ np.linalg.solve(normal, basis.T))[0]


def blended_coefs(computed: Sequence[int], step_index: int, blend: float) -> np.ndarray:
    """The spectral forecast, and a first-order one from the last two computed features: blend · one + (1 − blend) ·
    other.

    >>> blended_coefs([0, 2], 3, blend=0.0)
    array([-0.5,  1.5])
    """
    local = np.zeros(len(computed))
    nearest = forecast_coefs(computed, step_index, order=1)
    local[-len(nearest) :] = nearest
    return blend * chebyshev_coefs(computed, step_index) + (1.0 - blend) * local


def spectrum_schedule(warmup: int, window: float, growth: float, num_inference_steps: int) -> tuple[int, ...]:
    """Spectrum's adaptive schedule: `warmup` steps, then one in each window, which grows by `growth` every time."""
    computed, cached = [], 0
    for step in range(num_inference_steps):
        actual = step < warmup
        if not actual:
            actual = (cached + 1) % math.floor(window) == 0
            if actual:
                window = round(window + growth, 3)
        cached = 0 if actual else cached + 1
        if actual:
            computed.append(step)
    return tuple(computed)


def spectrum_program(table: SolverTable, schedule: Sequence[int], blend: float = 1.0) -> Program:
    """Every step of the sampler, features forecast by `blended_coefs` where they are not computed."""
    return forecast_program(
        table, schedule, lambda computed, step: blended_coefs(computed[-HISTORY:], step, blend).tolist()
    )


def candidate_spectrum_schedules(budget: int, num_inference_steps: int) -> list[tuple[int, ...]]:
    """Schedules of `budget` steps: all with the released warm-up and window, and a spread of those with others."""
    growths = np.arange(0.0, 20.0, 0.25)

    def schedules(warmups: Sequence[int], windows: Sequence[float]) -> list[tuple[int, ...]]:
        found = dict.fromkeys(
            spectrum_schedule(warmup, window, float(growth), num_inference_steps)
            for warmup in warmups
            for window in windows
            for growth in growths
        )
        return sorted(schedule for schedule in found if len(schedule) == budget)

    released = schedules([min(WARMUP, budget)], [WINDOW])
    windows = [float(window) for window in range(1, num_inference_steps)]
    others = [each for each in schedules(range(1, min(6, budget) + 1), windows) if each not in released]
    return released + others[:: max(1, -(-len(others) // OTHERS))]


def _build(bench: Bench, budget: int) -> Built:
    """The schedule and the blend that are best on calibration samples."""
    bench.check_residuals()
    schedules = candidate_spectrum_schedules(budget, bench.table.num_inference_steps)
    if not schedules:
        raise NotApplicable(f"no window of Spectrum's gives {budget} evaluations of {bench.table.num_inference_steps}")
    candidates = [
        Built(
            program=spectrum_program(bench.table, schedule, blend),
            setting=f"w {blend:g}, {schedule_text(schedule)}",
        )
        for schedule in schedules
        for blend in BLENDS
    ]
    return choose_program(bench, candidates, FeatureModel)


PUBLISHED = (10, 50)
"""The authors' own schedule with the fewest steps, by an audit of the first comparison."""

METHODS = (
    ProgramMethod(
        name="spectrum", group="cache", source="arXiv 2603.01623", build=_build, model=FeatureModel, published=PUBLISHED
    ),
)
