"""A graph's schedule with a Taylor forecast: what anyone can put together from published parts.

The schedule is any that `candidates` knows, and what is forecast are the blocks' residuals or the model's outputs, by
TaylorSeer's polynomials (arXiv 2503.06923) of order 0, 1 or 2. Calibration chooses.
"""

from __future__ import annotations

from ..programs.baselines import extrapolated_program
from .candidates import candidate_schedules
from .method import Bench, Built, ProgramMethod, choose_program, schedule_text
from .residual_forecasts import forecast_programs

SOURCE = "schedules of graphs, forecasts of arXiv 2503.06923"


def _build_residual(bench: Bench, budget: int) -> Built:
    bench.check_residuals()
    return choose_program(bench, forecast_programs(bench.table, candidate_schedules(bench, budget)))


def _build_output(bench: Bench, budget: int) -> Built:
    programs = [
        Built(
            program=extrapolated_program(bench.table, schedule, order, coordinate="index"),
            setting=f"taylor-{order}, {name}, {schedule_text(schedule)}",
        )
        for name, schedule in candidate_schedules(bench, budget).items()
        for order in (0, 1, 2)
    ]
    return choose_program(bench, programs)


METHODS = (
    ProgramMethod(
        name="graph + taylor (residuals)", group="schedule", source=SOURCE, build=_build_residual, uses_own=True
    ),
    ProgramMethod(name="graph + taylor (outputs)", group="schedule", source=SOURCE, build=_build_output, uses_own=True),
)
