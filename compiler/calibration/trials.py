"""Try schedules on the calibration set: fit each one's program in closed loop, decode what comes out, score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from otcache.schemas.manifest import Candidate
from otcache.schemas.program import Program

from ..options import Objective
from ..programs.solver_table import SolverTable, extrapolated_jump
from ..workspace.ledger import Ledger
from .fit import Stop, Stopped, fit_output_program
from .samples import Rows, Samples
from .scoring import scores_of

Schedule = tuple[int, ...]
PRIOR_ORDER = 1
"""Adams–Bashforth weights: what the fit falls back to where the data say nothing."""
MEMORY = 4
"""Outputs that a step weighs."""
SATURATED_SSIM = 0.999
"""From which on SSIM tells programs apart by its last digits only, and PSNR decides."""


def ssim_score(ssim: float, psnr_db: float) -> float:
    """SSIM up to `SATURATED_SSIM`; beyond, what PSNR says, between there and 1. Higher is better.

    >>> ssim_score(0.98, 40.0)
    0.98
    >>> ssim_score(0.9997, 48.0) < ssim_score(0.9996, 49.0) < 1
    True
    """
    if not ssim >= SATURATED_SSIM:
        return ssim
    return SATURATED_SSIM + (1 - SATURATED_SSIM) * (1 - 10 ** (-max(psnr_db, 0.0) / 20))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A program that was rolled out on the calibration set. Higher scores are better."""

    name: str
    program: Program
    schedule: Schedule
    psnr_db: float
    ssim: float
    score: float
    weight: float | None = None
    drifts: tuple[float, ...] = ()
    """Mean relative error of the latents at each computed step and at the end, of a program that was fitted."""

    def with_name(self, name: str, weight: float | None) -> Trial:
        """The same measurement under the name of another way that led to its schedule."""
        return replace(self, name=name, weight=weight)

    def candidate(self, chosen: bool) -> Candidate:
        """As the manifest records it."""
        return Candidate(
            name=self.name,
            payload=self.program.payload,
            schedule=self.schedule,
            weight=self.weight,
            psnr_db=self.psnr_db,
            ssim=self.ssim,
            chosen=chosen,
        )


TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A way to try schedules: samples, what is maximised on them, and how steps are fitted."""

    samples: Samples
    table: SolverTable
    """The full sampler."""
    objective: Objective
    ledger: Ledger
    memory: int = MEMORY
    """Outputs that a step weighs, unless a trial asks for others."""
    penalty: float = 1e-5
    known: dict[tuple[Schedule, int], Trial] = field(default_factory=dict)
    """What was fitted in this compile, by schedule and memory."""

    @property
    def count(self) -> int:
        """Samples of the set."""
        return self.samples.count

    def fit(
        self,
        schedule: Sequence[int],
        name: str = "",
        weight: float | None = None,
        stop: Stop | None = None,
        memory: int | None = None,
    ) -> Trial:
        """The `output` program of a schedule; one that was fitted before is not walked again.

        Args:
            schedule: increasing step indices, the first 0.
            name: of the way that led to it.
            weight: its place on the path between two policies, where it has one.
            stop: asked at every step whether the walk is worth going on with. Raises Stopped once it says so.
            memory: outputs that a step weighs; the calibration's own if it is None.
        """
        schedule = tuple(int(index) for index in schedule)
        memory = self.memory if memory is None else memory
        if (schedule, memory) not in self.known:
            self.known[schedule, memory] = self._fit_anew(schedule, name, weight, stop, memory)
        return self.known[schedule, memory].with_name(name, weight)

    def _fit_anew(self, schedule: Schedule, name: str, weight: float | None, stop: Stop | None, memory: int) -> Trial:
        reached = [0]

        def ask(position: int, drift: float) -> bool:
            reached[0] = position + 1
            return stop is not None and stop(position, drift)

        def compute() -> tuple[Any, int]:
            found = fit_output_program(
                self.samples,
                schedule,
                self._prior,
                self.table,
                memory=memory,
                penalty=self.penalty,
                stop=ask,
            )
            trial = self.trial_from_scores(name, found.program, found.scores, weight)
            return TRIAL.dump_python(replace(trial, drifts=found.drifts), mode="json"), found.evaluations

        try:
            value = self.ledger.get(["output, banded", list(schedule), memory], compute)
        except Stopped as stopped:
            self.ledger.add_computed(stopped.evaluations)
            self.charge_walk(schedule[: reached[0]], memory)
            raise
        self.charge_walk(schedule, memory)
        return TRIAL.validate_python(value)

    def charge_walk(self, schedule: Schedule, memory: int | None = None) -> None:
        """Walks that share their first steps share those evaluations; the very first is the full run's own.

        So do walks that weigh other numbers of outputs, as long as all of their outputs are among the weighed.
        """
        memory = self.memory if memory is None else memory
        ends = range(2, len(schedule) + 1)
        paths = [schedule[:end] if end <= memory + 1 else (schedule[:end], memory) for end in ends]
        self.ledger.charge_paths(paths, self.count)

    def try_program(self, key: Any, name: str, program: Program) -> Trial:
        """A program as it is, rolled out, or what that came to before (`key` says of what it was made)."""

        def compute() -> tuple[Any, int]:
            trial = self.trial_from_scores(name, program, self.samples.map(scores_of(program)), None)
            return TRIAL.dump_python(trial, mode="json"), program.nfe * self.count

        value = self.ledger.get(key, compute)
        self.ledger.charge(program.nfe * self.count)
        return TRIAL.validate_python(value)

    def trial_from_scores(self, name: str, program: Program, scores: Rows, weight: float | None) -> Trial:
        """What a program came to, its score by the objective."""
        means = {metric: float(np.mean(values)) for metric, values in scores.items()}
        by: dict[Objective, Callable[[], float]] = {
            "ssim": lambda: ssim_score(means["ssim"], means["psnr_db"]),
            "psnr": lambda: means["psnr_db"],
            "lpips": lambda: -means["lpips"],
        }
        return Trial(
            name=name,
            program=program,
            schedule=program.schedule,
            psnr_db=means["psnr_db"],
            ssim=means["ssim"],
            score=by[self.objective](),
            weight=weight,
        )

    def _prior(self, computed: Sequence[int], end: int) -> tuple[float, np.ndarray]:
        return extrapolated_jump(self.table, computed, end, PRIOR_ORDER)
