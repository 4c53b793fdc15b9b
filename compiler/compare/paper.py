"""OTCache as published (arXiv 2606.31026), with nothing of ours: residuals reused on a schedule between a reference
from a graph and an anchor from a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration.scoring import scores_of
from ..programs.residual import residual_edge_errors
from ..programs.schedule import uniform_schedule
from ..schedules.anchor import search_anchor
from ..schedules.interpolate import interpolated_schedule
from ..schedules.reference import Power, shortest_schedule
from ..schedules.search import residual_statistics
from .method import Bench, Built, ProgramMethod, choose_program
from .residual_forecasts import forecast_programs, reuse_program

TRIALS = 48


def residual_statistics_of(bench: Bench) -> np.ndarray:
    """Mean inner products (T, T) of the blocks' residuals along full runs of the tuning prompts, from the workspace."""
    bench.check_residuals()

    def compute() -> dict[str, np.ndarray]:
        return {"gram": residual_statistics(bench.calibration, bench.tuning.stop)}

    return bench.workspace.arrays("compare-residuals", [bench.key, bench.tuning.stop], compute)["gram"]


@dataclass(frozen=True)
class PaperSchedule:
    """A schedule between the two policies, and what they took to find, in full runs per prompt."""

    schedule: tuple[int, ...]
    full_runs: float


def paper_schedule(bench: Bench, budget: int) -> PaperSchedule:
    """The paper's three stages. Raises NotApplicable."""
    calibration, total = bench.calibration, bench.table.num_inference_steps
    errors = residual_edge_errors(bench.table, residual_statistics_of(bench))
    reference_budget, anchor_budget = round(0.4 * total), max(2, round(total / 12))

    def score(schedule: Sequence[int], _: Any) -> tuple[float, Sequence[float]]:
        program = reuse_program(bench.table, schedule)
        scores = calibration.samples.map(scores_of(program), bench.tuning)
        return calibration.trial_from_scores("anchor", program, scores, None).score, ()

    def compute() -> Any:
        anchor = search_anchor(
            score,
            budget=anchor_budget,
            num_inference_steps=total,
            trials=TRIALS,
            seed=bench.seed,
            starts=[shortest_schedule(errors, anchor_budget, Power(4.0)), uniform_schedule(anchor_budget, total)],
        )
        return {
            "reference": shortest_schedule(errors, reference_budget, Power(4.0)),
            "anchor": anchor.schedule,
            "full_runs": 1 + anchor.evaluated * anchor_budget / total,
        }

    found = bench.workspace.json("paper", [bench.key, bench.seed, bench.tuning.stop], compute)
    schedule = interpolated_schedule(found["reference"], found["anchor"], budget, total)
    return PaperSchedule(schedule=tuple(schedule), full_runs=found["full_runs"])


def _build(bench: Bench, budget: int) -> Built:
    """With residuals reused, or forecast to the first or second order, whichever calibration prefers."""
    found = paper_schedule(bench, budget)
    best = choose_program(bench, forecast_programs(bench.table, {"": found.schedule}))
    return Built(program=best.program, setting=best.setting, full_runs=found.full_runs)


METHODS = (ProgramMethod(name="otcache (paper)", group="otcache", source="arXiv 2606.31026", build=_build),)
