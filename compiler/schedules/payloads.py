"""The two payloads as families of programs: each has its own graph and its own way to make a program of a schedule.

Edges are weighed with the predictor that will run. Outputs, whose steps are fitted to what went before, also try the
path of the residuals: its weights come from other errors, so that it is a second opinion where the first one is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from otcache.schemas.program import Program

from ..calibration.batch import Batch
from ..calibration.fit import Stop
from ..calibration.rollout import roll_out
from ..calibration.samples import Rows
from ..calibration.trials import Calibration, Schedule, Trial
from ..programs.residual import FORECASTS, Forecast, residual_edge_errors, residual_program
from .gram import statistics_from_grams
from .reference import Minimax, Objective, Power, end_to_end_edge_errors, graph_schedules, shortest_schedule

RESIDUAL_GRAPHS: dict[str, Objective] = {
    "graph power 4": Power(4.0),
    "graph minimax": Minimax(),
    "graph power 1": Power(1.0),
}
"""What the residual payload's paths minimise."""
OTHER_MEMORIES = (2, 3, 5)
"""Outputs that a step weighs, beside the usual number, in other programs of a budget's best schedules."""


class Family(Protocol):
    """A payload, as the searches see it."""

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        """Shortest paths of exactly `budget` steps, by the name of what their edges were weighed with."""

    def attempts(
        self, schedule: Sequence[int], name: str, weight: float | None = None, stop: Stop | None = None
    ) -> list[Trial]:
        """Programs of a schedule, rolled out on the calibration set.

        stop: asked at every step whether to go on, where programs are walked. Raises Stopped once it says so.
        """

    def variants(self, trial: Trial) -> list[Trial]:
        """Other programs of a schedule that was tried."""


class OutputFamily:
    """Guided outputs are cached; coefficients are fitted in closed loop."""

    def __init__(self, calibration: Calibration, gram: np.ndarray | None = None) -> None:
        """`gram`: of the residuals (`search.residual_statistics`), where the model has any."""
        self.calibration = calibration
        samples = calibration.samples
        self.statistics = statistics_from_grams(samples.trajectory_gram(), samples.elements)
        self.residual_errors = None if gram is None else residual_edge_errors(calibration.table, gram)

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        """See `Family`."""
        found = graph_schedules(self.statistics, budget)
        if self.residual_errors is not None:
            schedule = shortest_schedule(self.residual_errors, budget, Power(4.0))
            if schedule not in found.values():
                found["graph power 4, residuals"] = schedule
        return found

    def attempts(
        self, schedule: Sequence[int], name: str, weight: float | None = None, stop: Stop | None = None
    ) -> list[Trial]:
        """See `Family`."""
        return [self.calibration.fit(schedule, name, weight, stop)]

    def variants(self, trial: Trial) -> list[Trial]:
        """With fewer or more outputs in each step, as far as it has taken so many."""
        own, budget = self.calibration.memory, len(trial.schedule)
        return [
            self.calibration.fit(trial.schedule, f"{trial.name}, {memory} outputs", trial.weight, memory=memory)
            for memory in OTHER_MEMORIES
            if min(memory, budget) != min(own, budget)
        ]


class ResidualFamily:
    """Residuals of the blocks are cached, as in the paper; forecast by reuse, by a polynomial or by a fit."""

    def __init__(
        self, calibration: Calibration, gram: np.ndarray, *, end_to_end: bool, forecasts: Sequence[Forecast] = FORECASTS
    ) -> None:
        self.calibration, self.gram, self.forecasts = calibration, gram, forecasts
        table = calibration.table
        if end_to_end:
            self.errors = end_to_end_edge_errors(self._replay, table.num_inference_steps)
        else:
            self.errors = residual_edge_errors(table, gram)
        self.tried: dict[tuple[Schedule, Forecast], Trial] = {}

    def graph_schedules(self, budget: int) -> dict[str, Schedule]:
        """See `Family`."""
        return {name: shortest_schedule(self.errors, budget, value) for name, value in RESIDUAL_GRAPHS.items()}

    def attempts(
        self, schedule: Sequence[int], name: str, weight: float | None = None, stop: Stop | None = None
    ) -> list[Trial]:
        """See `Family`. Programs are rolled out whole: nothing asks `stop`."""
        schedule = tuple(int(index) for index in schedule)
        return [self._attempt(schedule, forecast, name, weight) for forecast in self.forecasts]

    def variants(self, trial: Trial) -> list[Trial]:
        """None: every forecast of a schedule has been tried."""
        return []

    def _attempt(self, schedule: Schedule, forecast: Forecast, name: str, weight: float | None) -> Trial:
        if (schedule, forecast) not in self.tried:
            program = residual_program(self.calibration.table, schedule, forecast, self.gram)
            key = ["residual", forecast, list(schedule)]
            self.tried[schedule, forecast] = self.calibration.try_program(key, name, program)
        return self.tried[schedule, forecast].with_name(f"{name}, {forecast}", weight)

    def _replay(self, start: int, end: int) -> float:
        """LeMiCa's cost of an edge: blocks computed at `start`, reused up to `end`, computed afterwards; latent MSE."""
        calibration, total = self.calibration, self.calibration.table.num_inference_steps
        schedule = [index for index in range(total) if not start < index < end]
        program = residual_program(calibration.table, schedule, "reuse", self.gram)
        first = start if program.output_memory == 1 else 0  # no step weighs older outputs: start in the middle
        tail = Program(payload="residual", steps=program.steps[first:])
        evaluations = tail.nfe * calibration.count

        def compute() -> tuple[float, int]:
            errors = calibration.samples.map(squared_errors_of(tail, first))["squared_error"]
            return float(errors.mean()), evaluations

        found = float(calibration.ledger.get(["edge", start, end], compute))
        calibration.ledger.charge(evaluations)
        return found


def squared_errors_of(program: Program, start: int) -> Callable[[Batch], Rows]:
    """`squared_error` float64 (m,): mean squared error of the final latents of a program that begins at step
    `start`.
    """

    def answer(batch: Batch) -> Rows:
        final = roll_out(program, batch.denoiser, batch.latents(start), batch.evaluator.stages)
        difference = (final - batch.latents(-1)).double().square().flatten(1).mean(dim=1)
        return {"squared_error": difference.cpu().numpy()}

    return answer
