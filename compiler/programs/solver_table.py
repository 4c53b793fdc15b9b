"""A sampler as linear coefficients, and programs made of it.

Nothing here evaluates a model or loads a scheduler: `lower` makes the table.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.program import Payload, Program, Step

from .forecasts import lagrange_weights
from .schedule import check_schedule
from .schedulers import working_schedulers

FloatArray = NDArray[np.float64]

Coordinate = Literal["sigma", "index"]

DROP = 1e-7
"""Output coefficients below this part of the largest one of their step are zero: the precision of float32."""

MAX_MEMORY = 64
"""Longest `Step.output_coefs` that a program may hold (`otcache.schemas.program`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SolverTable:
    """A deterministic sampler as linear coefficients; arrays are float64 and read-only."""

    timesteps: FloatArray
    """(T,) times in the scheduler's own units, as the pipeline reads them from `scheduler.timesteps`."""
    input_scales: FloatArray
    """(T,) factors of the latents on their way into the model (`scale_model_input`)."""
    initial_scale: float
    """Standard deviation of the initial latents (`init_noise_sigma`)."""
    latent_coefs: FloatArray
    """(T,) factor of x_i in x_{i+1}."""
    output_coefs: FloatArray
    """(T, T) lower triangular; row i holds the weights of v_0 … v_i in x_{i+1}."""
    sigmas: FloatArray | None = None
    """(T+1,) noise levels, if the scheduler has them."""
    scheduler: str = ""
    """Class name of the scheduler."""
    prediction_type: str | None = None
    """`epsilon`, `v_prediction`, `sample` or `flow_prediction`, if the scheduler says."""
    order: int = 1
    """Evaluations per step of the user's count (`scheduler.order`; 2 for Heun)."""
    step_options: Mapping[str, float] = field(default_factory=dict)
    """What the pipeline passes to `scheduler.step` beside the tensors, such as `eta`."""

    def __post_init__(self) -> None:
        num_steps = np.asarray(self.timesteps).size
        shapes = {
            "timesteps": (num_steps,),
            "input_scales": (num_steps,),
            "latent_coefs": (num_steps,),
            "output_coefs": (num_steps, num_steps),
            "sigmas": (num_steps + 1,),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                continue
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != shape or not np.isfinite(array).all():
                raise ModelError(
                    f"solver table of {self.scheduler or 'a scheduler'}: {name} has shape {array.shape}"
                    f"{'' if np.isfinite(array).all() else ' and values that are not finite'}; expected finite numbers "
                    f"of shape {shape}. Check the scheduler's configuration and its number of steps."
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if np.triu(self.output_coefs, 1).any():
            raise ModelError(
                f"solver table of {self.scheduler or 'a scheduler'}: output_coefs weigh outputs of later steps, "
                f"expected a lower triangular array. Put the weights of step i's outputs v_0 … v_i into row i."
            )

    @property
    def num_inference_steps(self) -> int:
        """T, the number of model evaluations of the full sampler."""
        return len(self.timesteps)


def program_from_table(
    table: SolverTable, payload: Payload = "output", *, initial_scale: float | None = None
) -> Program:
    """The full program: every step computed.

    `initial_scale` is that of the latents the program will be given, if it is not the table's own: the first step then
    brings them to the table's scale, so programs of solvers with different conventions run on the same initial latents.
    """
    steps = []
    for i in range(table.num_inference_steps):
        rescale = 1.0 if i or initial_scale is None else table.initial_scale / initial_scale
        steps.append(
            step_from_table(table, i, table.latent_coefs[i] * rescale, table.output_coefs[i, : i + 1], rescale=rescale)
        )
    return Program(payload=payload, steps=tuple(steps))


def step_from_table(
    table: SolverTable, step_index: int, latent_coef: float, output_coefs: ArrayLike, *, rescale: float = 1.0
) -> Step:
    """A computed step at `step_index` of the table with the given update, its old vanishing coefficients cut off."""
    coefs = trim_coefs(output_coefs)
    if len(coefs) > MAX_MEMORY:
        raise ModelError(
            f"step {step_index} of {table.scheduler or 'a solver table'} weighs {len(coefs)} outputs, expected at most "
            f"{MAX_MEMORY}. Take another scheduler or fewer steps; these work: {', '.join(working_schedulers())}."
        )
    return Step(
        step_index=step_index,
        timestep=float(table.timesteps[step_index]),
        input_scale=float(table.input_scales[step_index] * rescale),
        latent_coef=float(latent_coef),
        output_coefs=coefs,
    )


def trim_coefs(output_coefs: ArrayLike) -> tuple[float, ...]:
    """Coefficients (newest last) with what is below `DROP` of the largest zero, without leading zeros, never empty.

    >>> trim_coefs([0.0, 1e-9, 0.5, 0.0])
    (0.5, 0.0)
    """
    coefs = drop_vanishing(np.asarray(output_coefs, dtype=np.float64))
    used = np.flatnonzero(coefs)
    return tuple(coefs[used[0] if used.size else -1 :].tolist())


def jump(table: SolverTable, i: int, j: int) -> tuple[float, FloatArray]:
    """x_j from x_i by the table's own steps i … j−1.

    Returns (latent_coef, output_coefs (T,)) with x_j = latent_coef · x_i + Σ_m output_coefs[m] · v_m, m < j. Of Euler
    on flow matching, whose step is x + (σ_{i+1} − σ_i) · v_i, a jump is the sum of its steps:

    >>> sigmas = np.array([1.0, 0.75, 0.5, 0.0])
    >>> euler = SolverTable(timesteps=1000 * sigmas[:-1], input_scales=np.ones(3), initial_scale=1.0,
    ...                     latent_coefs=np.ones(3), output_coefs=np.diag(np.diff(sigmas)), sigmas=sigmas)
    >>> latent_coef, output_coefs = jump(euler, 0, 2)
    >>> latent_coef, output_coefs.tolist()
    (1.0, [-0.25, -0.25, 0.0])
    """
    num_steps = table.num_inference_steps
    if not 0 <= i <= j <= num_steps:
        raise UsageError(f"jump from step {i} to step {j}: expected 0 ≤ start ≤ end ≤ {num_steps}, the steps there are")
    latent_coef, output_coefs = 1.0, np.zeros(num_steps)
    for step_index in range(i, j):
        latent_coef = latent_coef * float(table.latent_coefs[step_index])
        output_coefs = table.latent_coefs[step_index] * output_coefs + table.output_coefs[step_index]
    return latent_coef, output_coefs


def extrapolated_jump(
    table: SolverTable, computed: Sequence[int], j: int, order: int, *, coordinate: Coordinate = "sigma"
) -> tuple[float, FloatArray]:
    """x_j from x_i, i = computed[-1], when only the outputs at `computed` were evaluated.

    Every other output, in the jump and in the history that the solver still weighs, is the polynomial through the last
    `order` + 1 outputs that had been computed by then: order 0 holds the last one, order 1 is Adams–Bashforth like.

    Args:
        computed: increasing step indices, 0 the first.
        coordinate: variable of the polynomial; `sigma` falls back to the step index where the table has no sigmas
            or where two of them coincide (Heun).

    Returns (latent_coef, output_coefs (len(computed),)), newest last. With the output held, Euler's jump over steps
    that are not computed is one longer step; with order 1, outputs on a line are followed exactly:

    >>> sigmas = np.array([1.0, 0.75, 0.5, 0.0])
    >>> euler = SolverTable(timesteps=1000 * sigmas[:-1], input_scales=np.ones(3), initial_scale=1.0,
    ...                     latent_coefs=np.ones(3), output_coefs=np.diag(np.diff(sigmas)), sigmas=sigmas)
    >>> extrapolated_jump(euler, [0], 3, order=0)[1].tolist()
    [-1.0]
    >>> extrapolated_jump(euler, [0, 1], 3, order=1)[1].tolist()  # v_2 = 2 v_1 − v_0
    [0.5, -1.25]
    """
    nodes = check_schedule(computed, table.num_inference_steps)
    if order < 0:
        raise UsageError(f"extrapolation order is {order}, expected 0 (hold) or more")
    if not nodes[-1] <= j <= table.num_inference_steps:
        raise UsageError(
            f"extrapolated jump from step {nodes[-1]} to step {j}: expected an end in {nodes[-1]} … "
            f"{table.num_inference_steps}"
        )
    latent_coef, output_coefs = jump(table, nodes[-1], j)
    forecast = np.zeros((j, len(nodes)))
    for step_index in np.flatnonzero(output_coefs[:j]).tolist():
        available = bisect.bisect_right(nodes, step_index)
        if nodes[available - 1] == step_index:
            forecast[step_index, available - 1] = 1.0
        else:
            first = max(0, available - 1 - order)
            forecast[step_index, first:available] = _lagrange(table, nodes[first:available], step_index, coordinate)
    return latent_coef, output_coefs[:j] @ forecast


def _lagrange(table: SolverTable, nodes: Sequence[int], at: int, coordinate: Coordinate) -> FloatArray:
    """Weights of the values at `nodes` in their interpolation polynomial at `at`."""
    position = np.arange(table.num_inference_steps, dtype=np.float64)
    if coordinate == "sigma" and table.sigmas is not None and len(set(table.sigmas[list(nodes)])) == len(nodes):
        position = table.sigmas[:-1]
    return np.array(lagrange_weights(position[list(nodes)].tolist(), float(position[at])))


def drop_vanishing(coefs: FloatArray) -> FloatArray:
    """The coefficients with those below `DROP` of the largest as zeros.

    >>> drop_vanishing(np.array([1e-9, 0.5, -2.0])).tolist()
    [0.0, 0.5, -2.0]
    """
    return np.where(np.abs(coefs) < DROP * np.abs(coefs).max(initial=0.0), 0.0, coefs)
