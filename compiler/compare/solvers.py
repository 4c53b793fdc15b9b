"""Few-step solvers and caches with uniform steps: what a user would do without a caching library.

Users tune what a solver lets them: the shift of a flow's sigmas, the spacing of other timesteps, UniPC's corrector,
which its documentation advises against on early steps under strong guidance. So do these, on calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from diffusers.schedulers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from otcache.schemas.errors import ModelError, UsageError

from ..programs.baselines import (
    SetTimesteps,
    baseline_programs,
    few_step_program,
    flow_shift,
    plain_set_timesteps,
    prepare_flow,
)
from ..programs.lower import is_flow
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program

SHIFTS = (0.4, 0.55, 0.75, 1.0, 1.3, 1.8, 2.5, 3.5)
"""Times the shift with which the pipeline prepares its own scheduler."""
SPACINGS: tuple[dict[str, Any], ...] = (
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True},
)
Variant = tuple[str, Any, SetTimesteps]
"""What was set, a scheduler, and how it is prepared."""
Variants = Callable[[Any, int, float | None], Iterator[Variant]]
"""(the pipeline's scheduler, budget, shift of a flow or None) → what there is to choose from."""


def _flow_euler(euler: Any, num_steps: int) -> None:
    euler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps))


def euler_variants(scheduler: Any, budget: int, shift: float | None) -> Iterator[Variant]:
    """Euler with other shifts, or spacings."""
    if shift is None:
        for spacing in SPACINGS:
            yield _text(spacing), EulerDiscreteScheduler.from_config(scheduler.config, **spacing), plain_set_timesteps
    else:
        for factor in SHIFTS:
            options = {"shift": factor * shift, "use_dynamic_shifting": False}
            solver = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **options)
            yield f"shift {factor * shift:.3g}", solver, _flow_euler


def multistep_variants(
    solver_class: Any, options: dict[str, Any], correctors: Callable[[int], list[dict[str, Any]]]
) -> Variants:
    """A multistep solver's variants.

    Args:
        solver_class: diffusers' scheduler.
        options: of all variants.
        correctors: by budget, options to try with each shift or spacing.
    """

    def variants(scheduler: Any, budget: int, shift: float | None) -> Iterator[Variant]:
        for corrector in correctors(budget):
            common = {"thresholding": False, **options, **corrector}
            if shift is None:
                for spacing in ({}, *SPACINGS):
                    solver = solver_class.from_config(scheduler.config, **spacing, **common)
                    yield _text({**spacing, **corrector}), solver, plain_set_timesteps
                continue
            for factor in SHIFTS:
                flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}
                solver = solver_class.from_config(scheduler.config, flow_shift=factor * shift, **flow, **common)
                text = f"shift {factor * shift:.3g}"
                yield ", ".join(each for each in (text, _text(corrector)) if each), solver, prepare_flow

    return variants


def unipc_correctors(budget: int) -> list[dict[str, Any]]:
    """UniPC's corrector everywhere, not on the first steps, and nowhere.

    >>> unipc_correctors(2)
    [{}, {'disable_corrector': [0]}, {'disable_corrector': [0, 1]}]
    """
    lengths = dict.fromkeys([0, 1, min(3, budget), budget // 2, budget])
    return [{"disable_corrector": list(range(length))} if length else {} for length in sorted(lengths)]


def _text(options: dict[str, Any]) -> str:
    return ", ".join(
        f"no corrector on {len(value)} steps" if name == "disable_corrector" else f"{name} {value}"
        for name, value in options.items()
    )


def few_steps(name: str, source: str, variants: Variants | None = None) -> ProgramMethod:
    """One of `baseline_programs`, a solver with `budget` steps instead of T, and variants of it."""

    def build(bench: Bench, budget: int) -> Built:
        scheduler = bench.pipeline.scheduler
        found = baseline_programs(scheduler, bench.table, budget, bench.set_timesteps)
        candidates = [Built(program=found[name], setting="as the pipeline prepares it")] if name in found else []
        if variants is not None:
            shift = flow_shift(scheduler, budget, bench.set_timesteps) if is_flow(scheduler) else None
            candidates += _built_variants(bench, budget, variants(scheduler, budget, shift))
        if not candidates:
            raise NotApplicable(f"{name} cannot be built for {bench.table.scheduler} at {budget} steps")
        return choose_program(bench, candidates)

    return ProgramMethod(name=name, group="solver", source=source, build=build)


def _built_variants(bench: Bench, budget: int, variants: Iterator[Variant]) -> list[Built]:
    """Programs of those that can be built for this model."""
    table, built = bench.table, []
    try:
        for setting, solver, prepare in variants:
            try:
                program = few_step_program(
                    solver, budget, prepare, timeline=table.timesteps, initial_scale=table.initial_scale
                )
            except (ModelError, UsageError, ValueError, TypeError):
                continue
            built.append(Built(program=program, setting=setting))
    except (ValueError, TypeError, NotImplementedError):  # the solver does not take the scheduler's configuration
        pass
    return built


METHODS = (
    few_steps("euler", "fewer steps of Euler", euler_variants),
    few_steps(
        "dpm++2m",
        "DPM-Solver++ 2M, arXiv 2211.01095",
        multistep_variants(
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
            lambda budget: [{}],
        ),
    ),
    few_steps("unipc", "UniPC, arXiv 2302.04867", multistep_variants(UniPCMultistepScheduler, {}, unipc_correctors)),
    few_steps("uniform reuse", "output reused at uniform steps"),
    few_steps("uniform taylor-1", "output extrapolated at uniform steps"),
)
