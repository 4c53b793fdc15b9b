"""Passes `reference`, `anchor`, `interpolate` and `fit` in their order: calibration set → the best program per budget.

The three stages of OTCache (arXiv 2606.31026): a reference schedule from a graph at a conservative budget, an anchor
from an end-to-end search at an extreme one, and schedules between them by displacement interpolation. The graph's own
schedule at each budget costs nothing more, so it is rolled out as well and the better one is kept; all are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from otcache.schemas.errors import ModelError

from ..calibration.rollout import residual_gram
from ..calibration.trials import Calibration, Trial, json_from_trial, trial_from_json
from ..options import CompileOptions
from ..programs.residual import FORECASTS, Forecast
from ..programs.schedule import uniform_schedule
from ..programs.solver_table import program_from_table
from ..workspace.progress import Pass, Reporter
from .anchor import search_anchor
from .interpolate import candidate_weights, interpolated_schedule, interpolation_weight
from .payloads import RESIDUAL_GRAPHS, Family, OutputFamily, ResidualFamily

INTERPOLATION_WEIGHTS = 5
"""Positions on the path between the two policies that are tried for each budget, at most (`positions`)."""
FULL_RUNS = 10.0
"""What a compile may take for each calibration prompt, the prompt's own full run among it."""
OUTPUT_GRAPHS = 4
"""Schedules that the `output` payload's graphs give at most (`OutputFamily.graph_schedules`)."""
AUTO_FORECASTS: tuple[Forecast, ...] = ("reuse", "fitted")
"""Of the residual payload where `--payload auto` compares it with the output payload."""
RESIDUAL_SAMPLES = 8
"""Calibration samples along whose full runs the blocks' residuals are weighed."""
REFERENCE_GRAPHS = 2
"""Graph schedules that are rolled out at the reference budget, where each costs the most."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the searches came to. Costs are full runs of T steps per calibration prompt."""

    reference: Trial
    anchor: Trial
    trials: dict[int, list[Trial]]
    """Of each budget, the best first."""
    costs: dict[str, float]


def search(calibration: Calibration, options: CompileOptions, reporter: Reporter, storage: Path | None = None) -> Found:
    """Run the searches. `storage` is Optuna's database, with which an interrupted anchor search goes on."""
    total = calibration.table.num_inference_steps
    costs: dict[str, float] = {}
    charged = _meter(calibration, costs, total)

    gram = _residual_statistics(calibration, options, reporter, charged)
    family: Family = OutputFamily(calibration, gram)
    if options.payload == "residual" and gram is not None:
        with reporter.on("edges", options.edge_costs) as current:
            family = ResidualFamily(calibration, gram, end_to_end=options.edge_costs == "end-to-end")
            charged("edges", current)

    with reporter.on("reference", f"graph at budget {options.reference}") as advance:
        graphs = list(family.graph_schedules(options.reference).items())[:REFERENCE_GRAPHS]
        attempts = []
        for position, (name, schedule) in enumerate(graphs):
            attempts += family.attempts(schedule, name)
            advance(position + 1, len(graphs))
        reference = max(attempts, key=lambda trial: trial.score)
        charged("reference", advance)

    with reporter.on("anchor", f"{options.trials} trials at budget {options.anchor}") as advance:
        starts = dict.fromkeys(
            [*family.graph_schedules(options.anchor).values(), uniform_schedule(options.anchor, total)]
        )

        def score(schedule: tuple[int, ...]) -> float:
            return max(trial.score for trial in family.attempts(schedule, "anchor"))

        found = search_anchor(
            score,
            budget=options.anchor,
            num_inference_steps=total,
            starts=list(starts),
            trials=options.trials,
            seed=options.seed,
            storage=f"sqlite:///{storage}" if storage else None,
            progress=advance,
        )
        for schedule in found.schedules:  # those that Optuna's storage knew are charged as well
            score(schedule)
        anchor = max(family.attempts(found.schedule, "anchor"), key=lambda trial: trial.score)
        charged("anchor", advance)

    families = [family]
    if options.payload == "auto" and gram is not None:
        families.append(ResidualFamily(calibration, gram, end_to_end=False, forecasts=AUTO_FORECASTS))
    trials: dict[int, list[Trial]] = {}
    count = positions(options, calibration.trajectory.count, total)
    with reporter.on("interpolate, fit", f"budgets {', '.join(map(str, options.budgets))}") as advance:
        for position, budget in enumerate(options.budgets):
            attempts = _interpolated(family, reference, anchor, budget, options, count, total)
            for each in families:
                graphs = list(each.graph_schedules(budget).items())
                for name, schedule in graphs if each is family else graphs[:1]:
                    attempts += each.attempts(schedule, name)
            trials[budget] = sorted(attempts, key=lambda trial: -trial.score)
            advance(position + 1, len(options.budgets))
        charged("interpolate and fit", advance)
    return Found(reference=reference, anchor=anchor, trials=trials, costs=costs)


def refitted(found: Found, calibration: Calibration) -> Found:
    """The schedules that were found, as programs for another calibration set. The payload of each budget stays."""
    gram: np.ndarray | None = None
    trials: dict[int, list[Trial]] = {}
    for budget, (best, *_) in found.trials.items():
        family: Family = OutputFamily(calibration)
        if best.program.payload == "residual":
            gram = residual_statistics(calibration) if gram is None else gram
            family = ResidualFamily(calibration, gram, end_to_end=False, forecasts=AUTO_FORECASTS)
        attempts = family.attempts(best.schedule, best.name, best.weight)
        trials[budget] = sorted(attempts, key=lambda trial: -trial.score)
    return replace(found, trials=trials)


def positions(options: CompileOptions, prompts: int, total: int) -> int:
    """How many positions on the path are tried for each budget: with many budgets fewer, so that a compile keeps to
    `FULL_RUNS`.

    The law's own and the graph's schedules are always tried, so that six budgets and more may take longer. The residual
    payload, which rolls out every forecast of every schedule, keeps to no limit.

    total: T, the evaluations of a full run.
    """
    if options.payload == "residual":
        return INTERPOLATION_WEIGHTS
    allowed = (
        count
        for count in range(INTERPOLATION_WEIGHTS, 1, -1)
        if 1.0 + sum(_costs(options, prompts, count, total).values()) <= FULL_RUNS
    )
    return next(allowed, 1)


def highest_costs(options: CompileOptions, prompts: int, total: int) -> dict[str, float]:
    """What `search` charges at most, in full runs for each of the calibration prompts, before anything is computed.

    It is less where ways lead to the same schedule: a schedule is charged once.
    """
    return _costs(options, prompts, positions(options, prompts, total), total)


def _costs(options: CompileOptions, prompts: int, weights: int, total: int) -> dict[str, float]:
    """With so many positions on the path."""
    residual = options.payload == "residual"
    per_schedule = len(FORECASTS) if residual else 1
    graphs = len(RESIDUAL_GRAPHS) if residual else OUTPUT_GRAPHS

    def runs(schedules: int, budget: int, each: int) -> float:
        distinct = math.comb(total - 1, budget - 1)  # the first step is always computed
        return min(schedules, distinct) * each * budget / total

    costs = {"residuals": min(1.0, RESIDUAL_SAMPLES / prompts)}
    if residual:
        replayed = [1 + total - end for start in range(total) for end in range(start + 2, total + 1)]
        costs["edges"] = sum(replayed) / total if options.edge_costs == "end-to-end" else 0.0
    costs["reference"] = runs(REFERENCE_GRAPHS, options.reference, per_schedule)
    costs["anchor"] = runs(options.trials, options.anchor, per_schedule)
    costs["interpolate and fit"] = sum(
        runs(weights + graphs, budget, per_schedule)
        + (runs(1, budget, len(AUTO_FORECASTS)) if options.payload == "auto" else 0.0)
        for budget in options.budgets
    )
    return costs


def _interpolated(
    family: Family, reference: Trial, anchor: Trial, budget: int, options: CompileOptions, count: int, total: int
) -> list[Trial]:
    """Schedules on the path between the two policies, at `count` positions around the default law's."""
    default = interpolation_weight(budget, options.reference, options.anchor)
    found: dict[tuple[int, ...], float] = {}
    for weight in dict.fromkeys([default, *candidate_weights(default, count=count)]):
        schedule = interpolated_schedule(reference.schedule, anchor.schedule, budget, total, weight=weight)
        found.setdefault(schedule, float(weight))
    return [trial for schedule, weight in found.items() for trial in family.attempts(schedule, "interpolated", weight)]


def _residual_statistics(
    calibration: Calibration, options: CompileOptions, reporter: Reporter, charged: Callable[[str, Pass | None], None]
) -> np.ndarray | None:
    """Gram matrix of the blocks' residuals, or None where the model has none to cache."""
    if calibration.stages is None or not calibration.stages.features:
        if options.payload == "residual":
            raise ModelError(
                "--payload residual: this model's blocks turn no tensor into one of its shape: use --payload output"
            )
        charged("residuals", None)
        return None
    with reporter.on("residuals", "inner products along a full run") as advance:
        found = residual_statistics(calibration, advance)
        charged("residuals", advance)
    return found


def residual_statistics(calibration: Calibration, advance: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Gram matrix (T, T) of the blocks' residuals along full runs of a few calibration samples."""
    stages = calibration.stages
    assert stages is not None
    program = program_from_table(calibration.table, payload="residual")
    few = calibration.trajectory.rows(slice(RESIDUAL_SAMPLES))
    denoiser = replace(calibration.denoiser, conditioning=few.conditioning, guidance=few.guidance)

    def gram() -> list[list[float]]:
        values: list[list[float]] = residual_gram(program, denoiser, few.latents[0], stages, advance).tolist()
        return values

    return np.array(calibration.attempts.get(["residuals", few.count], denoiser.evaluations, gram))


def _meter(calibration: Calibration, costs: dict[str, float], total: int) -> Callable[[str, Pass | None], None]:
    """Charges the attempts since the last call to a name, in full runs per calibration prompt.

    The pass is told how many sample evaluations were computed, and how many were found in the workspace.
    """
    per_run = total * calibration.trajectory.count
    mark = [calibration.attempts.charged, calibration.denoiser.evaluations[0]]

    def charge(name: str, current: Pass | None) -> None:
        charged, computed = calibration.attempts.charged, calibration.denoiser.evaluations[0]
        costs[name] = (charged - mark[0]) / per_run
        if current is not None:
            current.facts["evaluations"] = computed - mark[1]
            current.facts["evaluations_reused"] = charged - mark[0] - (computed - mark[1])
        mark[:] = charged, computed

    return charge


def json_from_found(found: Found) -> dict[str, Any]:
    """A JSON value that `found_from_json` reads back."""
    return {
        "reference": json_from_trial(found.reference),
        "anchor": json_from_trial(found.anchor),
        "costs": found.costs,
        "trials": {
            str(budget): [json_from_trial(value) for value in values] for budget, values in found.trials.items()
        },
    }


def found_from_json(value: dict[str, Any]) -> Found:
    """The inverse of `json_from_found`."""
    return Found(
        reference=trial_from_json(value["reference"]),
        anchor=trial_from_json(value["anchor"]),
        costs=value["costs"],
        trials={
            int(budget): [trial_from_json(fields) for fields in values] for budget, values in value["trials"].items()
        },
    )
