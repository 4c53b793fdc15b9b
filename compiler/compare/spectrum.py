"""Spectrum (arXiv 2603.01623): the blocks' output forecast by a ridge regression on Chebyshev polynomials in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from otcache.schemas.program import Program

from ..calibration.rollout import StagedModel
from ..programs.solver_table import SolverTable, program_from_table
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program


class FeatureModel(StagedModel):
    """Forecasts what the blocks put out, rather than what they add, as Spectrum and TaylorSeer's lite form do."""

    def _bridge(self, values: dict[str, Tensor], step: Any) -> None:
        results = [result for _, result in self.stages.features]
        if step.compute:
            self.residuals.append({name: values[name] for name in results})
            self.residuals = self.residuals[-self.keep :]
            return
        recent = self.residuals[-len(step.residual_coefs) :]
        for name in results:
            values[name] = sum(coef * kept[name] for coef, kept in zip(step.residual_coefs, recent, strict=True))  # type: ignore[assignment]


def chebyshev_coefs(
    computed: Sequence[int], step_index: int, num_inference_steps: int, *, degree: int = 4, penalty: float = 0.1
) -> np.ndarray:
    """Weights float64 (len(computed),) of computed features in Spectrum's forecast (arXiv 2603.01623).

    Ridge regression on Chebyshev polynomials T_0 … T_degree of τ = 2t/T − 1; degree and penalty as released.
    """

    def design(steps: Sequence[int]) -> np.ndarray:
        tau = 2.0 * np.asarray(steps, dtype=np.float64) / num_inference_steps - 1.0
        return np.polynomial.chebyshev.chebvander(tau, degree)

    basis = design(computed)
    normal = basis.T @ basis + penalty * np.eye(degree + 1)
    return (design([step_index]) @ np.linalg.solve(normal, basis.T))[0]


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


def spectrum_program(table: SolverTable, schedule: Sequence[int]) -> Program:
    """Every step of the sampler, features forecast by `chebyshev_coefs` where they are not computed."""
    computed: list[int] = []
    steps = []
    for step in program_from_table(table, payload="residual").steps:
        if step.step_index in schedule:
            computed.append(step.step_index)
            steps.append(step)
        else:
            coefs = chebyshev_coefs(computed[-16:], step.step_index, table.num_inference_steps)
            steps.append(step.model_copy(update={"compute": False, "residual_coefs": tuple(coefs.tolist())}))
    return Program(payload="residual", steps=tuple(steps))


def _build(bench: Bench, budget: int) -> Built:
    """Warm-up, first window and growth chosen for the budget: the best on the calibration set."""
    bench.check_residuals()
    total = bench.table.num_inference_steps
    schedules = {
        schedule
        for warmup in range(1, min(6, budget) + 1)
        for window in range(1, total)
        for growth in (0.0, 0.75, 3.0)
        if len(schedule := spectrum_schedule(warmup, float(window), growth, total)) == budget
    }
    if not schedules:
        raise NotApplicable(f"no window of Spectrum's gives {budget} evaluations of {total}")
    spread = sorted(schedules)[:: max(1, len(schedules) // 8)]
    programs = [Built(program=spectrum_program(bench.table, schedule)) for schedule in spread]
    return choose_program(bench, programs, FeatureModel)


METHODS = (ProgramMethod(name="spectrum", group="cache", source="arXiv 2603.01623", build=_build, model=FeatureModel),)
