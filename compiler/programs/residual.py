"""Programs of the `residual` payload: the paper's family, where a cached step runs embed and head but not the blocks.

Consumes the solver's table and the Gram matrix of the blocks' residuals along one full run; needs no model evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from otcache.schemas.program import Program

from .forecasts import forecast_coefs
from .solver_table import SolverTable, program_from_table

Forecast = Literal["reuse", "taylor-1", "taylor-2", "fitted"]
FORECASTS: tuple[Forecast, ...] = ("reuse", "taylor-1", "fitted")
MEMORY = 3
PENALTY = 1e-4


def fit_coefs(gram: np.ndarray, computed: Sequence[int], step_index: int) -> tuple[float, ...]:
    """Ridge weights of the last residuals that best give the one at `step_index`, drawn towards plain reuse.

    min_c ‖r_s − Σ c_m r_m‖² + λ ‖c − c₀‖²_{diag G}, closed form in the Gram matrix float64 (T, T). Of residuals on a
    line it finds the line's continuation, but for the pull of λ:

    >>> residuals = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> coefs = fit_coefs(residuals @ residuals.T, [0, 1], 2)
    >>> [round(coef, 2) for coef in coefs]
    [-1.0, 2.0]
    """
    recent = list(computed[-MEMORY:])
    prior = np.zeros(len(recent))
    prior[-1] = 1.0
    block = gram[np.ix_(recent, recent)]
    weight = PENALTY * np.diag(np.diag(block))
    solution = np.linalg.solve(block + weight, gram[recent, step_index] + weight @ prior)
    return tuple(float(value) for value in solution)


def residual_program(table: SolverTable, schedule: Sequence[int], forecast: Forecast, gram: np.ndarray) -> Program:
    """The full sampler's steps with the blocks computed at `schedule` and forecast elsewhere."""
    computed: list[int] = []
    steps = []
    for step in program_from_table(table, payload="residual").steps:
        if step.step_index in schedule:
            computed.append(step.step_index)
            steps.append(step)
            continue
        if forecast == "fitted":
            coefs = fit_coefs(gram, computed, step.step_index)
        else:
            order = {"reuse": 0, "taylor-1": 1, "taylor-2": 2}[forecast]
            coefs = forecast_coefs(computed, step.step_index, order)
        steps.append(step.model_copy(update={"compute": False, "residual_coefs": tuple(map(float, coefs))}))
    return Program(payload="residual", steps=tuple(steps))


def residual_edge_errors(table: SolverTable, gram: np.ndarray) -> np.ndarray:
    """Cost float64 (T, T+1) of computing at i and reusing its residual up to j.

    Each skipped step s adds the squared error of its residual, weighed with how far the solver moves at s:
    e(i→j) = Σ_{i<s<j} b_s² ‖r_s − r_i‖², b_s the newest output coefficient. An estimate that takes the head as linear.
    Infinite where j ≤ i.

    >>> table = SolverTable(timesteps=[3.0, 2.0, 1.0], input_scales=np.ones(3), initial_scale=1.0,
    ...                     latent_coefs=np.ones(3), output_coefs=-0.5 * np.eye(3))
    >>> residuals = np.array([[0.0], [1.0], [3.0]])
    >>> residual_edge_errors(table, residuals @ residuals.T)
    array([[ inf, 0.  , 0.25, 2.5 ],
           [ inf,  inf, 0.  , 1.  ],
           [ inf,  inf,  inf, 0.  ]])
    """
    total = gram.shape[0]
    squares = np.diag(gram)
    weights = np.array([table.output_coefs[s, s] ** 2 for s in range(total)])
    distance = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0) * weights[None, :]
    errors = np.full((total, total + 1), np.inf)
    for start in range(total):
        running = 0.0
        for end in range(start + 1, total + 1):
            errors[start, end] = running
            if end < total:
                running += distance[start, end]
    return errors
