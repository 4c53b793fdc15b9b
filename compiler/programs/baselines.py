"""What a user would do without otcache, as programs of B evaluations: the peers in every report.

Two families. Few-step solvers take B steps instead of T: the pipeline's own scheduler, Euler, DPM-Solver++ 2M
(arXiv 2211.01095) and UniPC (arXiv 2302.04867), each built from the same configuration and lowered. Training-free
caches walk the full timeline and evaluate at B uniform steps of it: the output held (as in FORA, arXiv 2407.01425) or
extrapolated by finite differences (as in TaylorSeer, arXiv 2503.06923).

All start from the initial latents of the pipeline's own sampler and end in its images, so they compare one to one.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import ArrayLike

from otcache.schemas.errors import ModelError, UsageError
from otcache.schemas.program import Program

from .lower import effective_options, is_flow, lower
from .schedule import check_schedule, uniform_schedule
from .solver_table import Coordinate, SolverTable, extrapolated_jump, program_from_table, step_from_table

SetTimesteps = Callable[[Any, int], None]
"""`set_timesteps(scheduler, num_steps)`: how the pipeline prepares its scheduler, with its sigmas and shift."""

_LOG = logging.getLogger(__name__)
_SOLVERS = ("euler", "dpm++2m", "unipc")
_EULER = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


def plain_set_timesteps(scheduler: Any, num_steps: int) -> None:
    """The default `SetTimesteps`, of pipelines that pass a number of steps and nothing else."""
    scheduler.set_timesteps(num_steps)


def uniform_reuse_program(table: SolverTable, schedule: Sequence[int]) -> Program:
    """The full timeline with the latest computed output held through every step that is not in `schedule`."""
    return extrapolated_program(table, schedule, order=0)


def taylor_program(table: SolverTable, schedule: Sequence[int], order: int = 1) -> Program:
    """The full timeline with outputs forecast by finite differences of the last `order` + 1 computed, by step index."""
    return extrapolated_program(table, schedule, order=order, coordinate="index")


def extrapolated_program(
    table: SolverTable, schedule: Sequence[int], order: int, *, coordinate: Coordinate = "sigma"
) -> Program:
    """A program that evaluates at `schedule`, its coefficients those of `extrapolated_jump` from one to the next."""
    computed = check_schedule(schedule, table.num_inference_steps)
    ends = (*computed[1:], table.num_inference_steps)
    steps = []
    for position, (step_index, end) in enumerate(zip(computed, ends, strict=True)):
        latent_coef, output_coefs = extrapolated_jump(
            table, computed[: position + 1], end, order, coordinate=coordinate
        )
        steps.append(step_from_table(table, step_index, latent_coef, output_coefs))
    return Program(payload="output", steps=tuple(steps))


def few_step_program(
    scheduler: Any,
    budget: int,
    set_timesteps: SetTimesteps = plain_set_timesteps,
    *,
    timeline: ArrayLike | None = None,
    initial_scale: float | None = None,
    step_options: Mapping[str, float] | None = None,
) -> Program:
    """The scheduler's own sampler with `budget` evaluations; the scheduler is left untouched.

    Args:
        scheduler: any that `lower` takes, prepared or not.
        set_timesteps: how the pipeline prepares it. Where n steps are not n evaluations (Heun, PNDM), the largest n is
            taken that needs at most `budget`; a solver of two evaluations a step may leave one unused.
        timeline: (T,) timesteps of the full sampler. Each step then carries the index of the nearest one, distinct and
            increasing from 0; without it, step indices count from 0.
        initial_scale: scale of the initial latents that the program is given, if not the scheduler's own.
        step_options: as `lower` takes them.
    """
    table = _few_step_table(scheduler, budget, set_timesteps, step_options)
    program = program_from_table(table, initial_scale=initial_scale)
    if timeline is None:
        return program
    indices = nearest_step_indices(table.timesteps, timeline)
    steps = [
        step.model_copy(update={"step_index": step_index})
        for step, step_index in zip(program.steps, indices, strict=True)
    ]
    return Program(payload="output", steps=tuple(steps))


def nearest_step_indices(timesteps: ArrayLike, timeline: ArrayLike) -> tuple[int, ...]:
    """Strictly increasing indices into `timeline`, the first 0, with the least total distance to `timesteps`.

    Shapes: timesteps (B,), timeline (T,), B ≤ T. Exact, by dynamic programming.

    >>> nearest_step_indices([900.0, 490.0, 480.0], [1000.0, 800.0, 500.0, 300.0])
    (0, 2, 3)
    """
    few, full = np.asarray(timesteps, dtype=np.float64), np.asarray(timeline, dtype=np.float64)
    if not 1 <= len(few) <= len(full):
        raise UsageError(f"few-step sampler with {len(few)} evaluations: expected 1 … {len(full)}, the full sampler's")
    distances = np.abs(few[:, None] - full[None, :])
    best = np.full(distances.shape, np.inf)  # best[k, i]: least cost of steps 0 … k, with step k at index i
    best[0, 0] = distances[0, 0]
    for k in range(1, len(few)):
        best[k, 1:] = distances[k, 1:] + np.minimum.accumulate(best[k - 1])[:-1]
    indices = [int(np.argmin(best[-1]))]
    for k in range(len(few) - 1, 0, -1):
        indices.append(int(np.argmin(best[k - 1, : indices[-1]])))
    return tuple(reversed(indices))


def baseline_programs(
    scheduler: Any, table: SolverTable, budget: int, set_timesteps: SetTimesteps = plain_set_timesteps
) -> dict[str, Program]:
    """All baselines at `budget` evaluations, by the name that reports show.

    Args:
        scheduler: the pipeline's own, from which the others are configured.
        table: its full sampler, lowered; every program runs on initial latents of this table's `initial_scale`.
        set_timesteps: how the pipeline prepares `scheduler`; the other solvers are given a number of steps.

    Returns `euler`, `dpm++2m`, `unipc`, `uniform reuse`, `uniform taylor-1` and the pipeline's own scheduler under its
    name where that is a different program. A solver that cannot be built for the model is left out, with a warning.
    """
    schedule = uniform_schedule(budget, table.num_inference_steps)
    builders: dict[str, Callable[[], tuple[Any, SetTimesteps]]] = {
        "euler": lambda: _euler(scheduler, budget, set_timesteps),
        "dpm++2m": lambda: _dpm(scheduler, budget, set_timesteps),
        "unipc": lambda: _unipc(scheduler, budget, set_timesteps),
        _own_name(scheduler): lambda: (scheduler, set_timesteps),
    }
    programs: dict[str, Program] = {}
    for name, build in builders.items():
        try:
            solver, prepare = build()
            program = few_step_program(
                solver,
                budget,
                prepare,
                timeline=table.timesteps,
                initial_scale=table.initial_scale,
                step_options=table.step_options,
            )
        except (ModelError, UsageError, ValueError, TypeError) as error:
            _LOG.warning("baseline %s at budget %d is left out: %s", name, budget, error)
            continue
        if name in _SOLVERS or program not in programs.values():
            programs[name] = program
    programs["uniform reuse"] = uniform_reuse_program(table, schedule)
    programs["uniform taylor-1"] = taylor_program(table, schedule, order=1)
    return programs


def flow_shift(scheduler: Any, num_steps: int, set_timesteps: SetTimesteps = plain_set_timesteps) -> float:
    """The shift s of σ ↦ s·σ / (1 + (s − 1)·σ) with which the pipeline prepares a flow scheduler.

    With dynamic shifting it is exp(mu) (or mu, for the linear type), mu read from the pipeline's own call.
    """
    options = effective_options(scheduler)
    if options.get("use_dynamic_shifting"):
        probe = copy.deepcopy(scheduler)
        received: dict[str, Any] = {}
        original = probe.set_timesteps

        def record(*args: Any, **kwargs: Any) -> None:
            received.update(kwargs)
            original(*args, **kwargs)

        probe.set_timesteps = record
        set_timesteps(probe, num_steps)
        mu = float(received.get("mu", 0.0))
        return mu if options.get("time_shift_type") == "linear" else math.exp(mu)
    return float(options.get("shift", options.get("flow_shift", 1.0)))


def _few_step_table(
    scheduler: Any, budget: int, set_timesteps: SetTimesteps, step_options: Mapping[str, float] | None = None
) -> SolverTable:
    """The scheduler's sampler with as many steps as `budget` evaluations allow."""
    if budget < 1:
        raise UsageError(f"budget {budget}: expected 1 or more evaluations")
    for num_steps in range(budget, 0, -1):
        prepared = copy.deepcopy(scheduler)
        set_timesteps(prepared, num_steps)
        if len(prepared.timesteps) <= budget:
            return lower(prepared, step_options=step_options)
    raise UsageError(
        f"scheduler {type(scheduler).__name__} needs {len(prepared.timesteps)} evaluations for a single step, "
        f"expected at most the budget {budget}. Raise the budget."
    )


def _own_name(scheduler: Any) -> str:
    """Report name of the pipeline's own scheduler: its class, short."""
    name = type(scheduler).__name__
    if name in _EULER:
        return "euler"
    for ending in ("Scheduler", "Discrete", "Multistep"):
        name = name.removesuffix(ending)
    name = name.lower()
    return f"{name} (own)" if name == "unipc" else name


def _euler(scheduler: Any, budget: int, set_timesteps: SetTimesteps) -> tuple[Any, SetTimesteps]:
    if type(scheduler).__name__ in _EULER:
        return scheduler, set_timesteps
    if not is_flow(scheduler):
        return EulerDiscreteScheduler.from_config(scheduler.config), plain_set_timesteps
    shift = flow_shift(scheduler, budget, set_timesteps)
    solver = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)

    def prepare(euler: Any, num_steps: int) -> None:
        # Flux's grid: given a number of steps alone, this class would spend its last step on the smallest sigma.
        euler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps))

    return solver, prepare


def _dpm(scheduler: Any, budget: int, set_timesteps: SetTimesteps) -> tuple[Any, SetTimesteps]:
    solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "thresholding": False}
    return _multistep(DPMSolverMultistepScheduler, scheduler, budget, set_timesteps, solver)


def _unipc(scheduler: Any, budget: int, set_timesteps: SetTimesteps) -> tuple[Any, SetTimesteps]:
    return _multistep(UniPCMultistepScheduler, scheduler, budget, set_timesteps, {"thresholding": False})


def _multistep(
    solver_class: Any, scheduler: Any, budget: int, set_timesteps: SetTimesteps, options: dict[str, Any]
) -> tuple[Any, SetTimesteps]:
    """A multistep solver for the same model, and how to prepare it."""
    if not is_flow(scheduler):
        return solver_class.from_config(scheduler.config, **options), plain_set_timesteps
    if effective_options(scheduler).get("invert_sigmas"):
        raise ModelError(
            f"scheduler {type(scheduler).__name__} has invert_sigmas=True; {solver_class.__name__} expects sigmas that "
            f"fall to 0. There is no such baseline for this model."
        )
    solver = solver_class.from_config(
        scheduler.config,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=flow_shift(scheduler, budget, set_timesteps),
        use_dynamic_shifting=False,
        **options,
    )
    return solver, prepare_flow


def prepare_flow(solver: Any, num_steps: int) -> None:
    """Timesteps that agree with the sigmas: diffusers cuts these solvers' timesteps off to integers."""
    solver.set_timesteps(num_steps)
    solver.timesteps = solver.sigmas[:-1].to(torch.float32) * solver.config.num_train_timesteps
