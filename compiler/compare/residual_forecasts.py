"""Programs that reuse or extrapolate the blocks' residuals: what caches with a fixed schedule come down to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from otcache.schemas.program import Program

from ..programs.forecasts import forecast_coefs
from ..programs.solver_table import SolverTable, program_from_table
from .method import Built, schedule_text

Coefs = Callable[[Sequence[int], int], Sequence[float]]
"""(computed steps, step) → weights of the last computed residuals in the forecast at the step, newest last."""


def taylorseer_coefs(computed: Sequence[int], step_index: int, order: int) -> tuple[float, ...]:
    """Weights of the last `order` + 1 computed values in TaylorSeer's forecast (arXiv 2503.06923), newest last.

    As released: derivatives by differences of the last derivatives over the last distance of computed steps. Up to the
    first order that is the polynomial of `forecast_coefs`; beyond, on uneven steps too, it is not.

    >>> taylorseer_coefs([0, 4, 6], 7, order=1)
    (-0.5, 1.5)
    """
    count = min(order, len(computed) - 1) + 1
    factors: list[np.ndarray] = []
    for position, step in enumerate(computed):
        newest = [np.eye(len(computed))[position]]
        for before in factors[:order]:
            newest.append((newest[-1] - before) / (step - computed[position - 1]))
        factors = newest
    elapsed = step_index - computed[-1]
    weights = sum(factor * elapsed**power / math.factorial(power) for power, factor in enumerate(factors))
    return tuple(float(each) for each in np.asarray(weights)[-count:])


FORECASTS: dict[str, Coefs] = {
    "reuse": lambda computed, step: forecast_coefs(computed, step, 0),
    "taylor-1": lambda computed, step: forecast_coefs(computed, step, 1),
    "taylor-2": lambda computed, step: forecast_coefs(computed, step, 2),
    "taylorseer-2": lambda computed, step: taylorseer_coefs(computed, step, 2),
}
"""Polynomials of orders 0, 1 and 2 in the step, and TaylorSeer's own second order."""


def forecast_program(table: SolverTable, schedule: Sequence[int], coefs: Coefs) -> Program:
    """The full sampler with the blocks' residual forecast where it is not computed."""
    computed: list[int] = []
    steps = []
    for step in program_from_table(table, payload="residual").steps:
        if step.step_index in schedule:
            computed.append(step.step_index)
        else:
            weights = tuple(map(float, coefs(computed, step.step_index)))
            step = step.model_copy(update={"compute": False, "residual_coefs": weights})
        steps.append(step)
    return Program(payload="residual", steps=tuple(steps))


def reuse_program(table: SolverTable, schedule: Sequence[int]) -> Program:
    """The full sampler with the blocks' residual reused where it is not computed."""
    return forecast_program(table, schedule, FORECASTS["reuse"])


def forecast_programs(table: SolverTable, schedules: Mapping[str, Sequence[int]]) -> list[Built]:
    """A program for each schedule and forecast, with a setting that names them."""
    return [
        Built(
            program=forecast_program(table, schedule, coefs),
            setting=", ".join(each for each in (forecast, name, schedule_text(tuple(schedule))) if each),
        )
        for name, schedule in schedules.items()
        for forecast, coefs in FORECASTS.items()
    ]
