"""The two payloads as families of programs: each has its own graph and its own way to make a program of a schedule.

Edges are weighed with the predictor that will run. Outputs, whose steps are fitted to what went before, also try the
path of the residuals: its weights come from other errors, so that it is a second opinion where the first one is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
from torch import Tensor

from otcache.schemas.program import Program

from ..calibration.rollout import roll_out
from ..calibration.trials import Calibration, Schedule, Trial
from ..programs.residual import FORECASTS, Forecast, residual_edge_errors, residual_program
from .gram import statistics_from_trajectory
from .reference import Minimax, Objective, Power, end_to_end_edge_errors, graph_schedules, shortest_schedule

RESIDUAL_GRAPHS: dict[str, Objective] = {
    "graph power 4": Power(4.0),
    "graph minimax": Minimax(),
    "graph power 1": Power(1.0),
}
"""What the residual payload's paths minimise."""


class Family(Protocol):
    """A payload, as the searches see it."""

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        """Shortest paths of exactly `budget` steps, by the name of what their edges were weighed with."""

    def attempts(self, schedule: Sequence[int], name: str, weight: float | None = None) -> list[Trial]:
        """Programs of a schedule, rolled out on the calibration set."""


class OutputFamily:
    """Guided outputs are cached; coefficients are fitted in closed loop."""

    def __init__(self, calibration: Calibration, gram: np.ndarray | None = None) -> None:
        """`gram`: of the residuals (`search.residual_statistics`), where the model has any."""
        self.calibration = calibration
        trajectory = calibration.trajectory
        self.statistics = statistics_from_trajectory(trajectory.latents.numpy(), trajectory.outputs.numpy())
        self.residual_errors = None if gram is None else residual_edge_errors(calibration.table, gram)

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        found = graph_schedules(self.statistics, budget)
        if self.residual_errors is not None:
            schedule = shortest_schedule(self.residual_errors, budget, Power(4.0))
            if schedule not in found.values():
                found["graph power 4, residuals"] = schedule
        return found

    def attempts(self, schedule: Sequence[int], name: str, weight: float | None = None) -> list[Trial]:
        return [self.calibration.fit(schedule, name, weight)]


class ResidualFamily:
    """Residuals of the blocks are cached, as in the paper; forecast by reuse, by a polynomial or by a fit."""

    def __init__(
        self, calibration: Calibration, gram: np.ndarray, *, end_to_end: bool, forecasts: Sequence[Forecast] = FORECASTS
    ) -> None:
        self.calibration, self.gram, self.forecasts = calibration, gram, forecasts
        table = calibration.table
        if end_to_end:
            attempts, counter = calibration.attempts, calibration.denoiser.evaluations
            self.errors = end_to_end_edge_errors(
                lambda i, j: float(attempts.get(["edge", i, j], counter, lambda: self._replay(i, j))),
                table.num_inference_steps,
            )
        else:
            self.errors = residual_edge_errors(table, gram)
        self.tried: dict[tuple[Schedule, Forecast], Trial] = {}

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        return {name: shortest_schedule(self.errors, budget, value) for name, value in RESIDUAL_GRAPHS.items()}

    def attempts(self, schedule: Sequence[int], name: str, weight: float | None = None) -> list[Trial]:
        schedule = tuple(int(index) for index in schedule)
        return [self._attempt(schedule, forecast, name, weight) for forecast in self.forecasts]

    def _attempt(self, schedule: Schedule, forecast: Forecast, name: str, weight: float | None) -> Trial:
        if (schedule, forecast) not in self.tried:
            program = residual_program(self.calibration.table, schedule, forecast, self.gram)
            self.tried[schedule, forecast] = self.calibration.attempt(
                ["residual", forecast, list(schedule)], partial(self.calibration.try_program, name, program)
            )
        return self.tried[schedule, forecast].named(f"{name}, {forecast}", weight)

    def _replay(self, start: int, end: int) -> float:
        """LeMiCa's cost of an edge: blocks computed at `start`, reused up to `end`, computed afterwards; latent MSE."""
        table = self.calibration.table
        schedule = [index for index in range(table.num_inference_steps) if not start < index < end]
        program = residual_program(table, schedule, "reuse", self.gram)
        tail = Program(payload="residual", steps=program.steps[start:]) if _memoryless(program) else program
        first = start if tail is not program else 0
        latents = self.calibration.trajectory.latents
        final: Tensor = roll_out(tail, self.calibration.denoiser, latents[first], self.calibration.stages)
        return float((final - latents[-1]).square().mean())


def _memoryless(program: Program) -> bool:
    """Whether each step weighs its own output only, so that a replay can start anywhere."""
    return program.output_memory == 1
