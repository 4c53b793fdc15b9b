"""Passes `reference`, `anchor`, `interpolate` and `fit` in their order: calibration set → the best program per budget.

The three stages of OTCache (arXiv 2606.31026): a reference schedule from a graph at a conservative budget, an anchor
from an end-to-end search at an extreme one, and schedules between them by displacement interpolation. The graph's own
schedule at each budget costs nothing more, so it is rolled out as well and the better one is kept; all are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from otcache.schemas.errors import ModelError
from otcache.schemas.program import Program

from .anchor import search_anchor
from .baselines import uniform_schedule
from .calibrate import Calibration, Trial
from .families import Family, OutputFamily, ResidualFamily
from .interpolate import candidate_weights, interpolated_schedule, interpolation_weight
from .lower import program_from_table
from .options import CompileOptions
from .progress import Reporter
from .rollout import residual_gram

INTERPOLATION_WEIGHTS = 5
"""Positions on the path between the two policies that are tried for each budget."""
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
    total = options.num_inference_steps
    costs: dict[str, float] = {}
    charged = _meter(calibration, costs, total)

    gram = None
    if options.payload != "output":
        gram = _residual_statistics(calibration, options, reporter)
        charged("residuals")
    family: Family = OutputFamily(calibration)
    if options.payload == "residual" and gram is not None:
        family = ResidualFamily(calibration, gram, end_to_end=options.edge_costs == "end-to-end")
        charged("edges")

    with reporter.on("reference", f"graph at budget {options.reference}") as advance:
        graphs = list(family.graph_schedules(options.reference).items())[:REFERENCE_GRAPHS]
        attempts = []
        for position, (name, schedule) in enumerate(graphs):
            attempts += family.attempts(schedule, name)
            advance(position + 1, len(graphs))
        reference = max(attempts, key=lambda trial: trial.score)
        charged("reference")

    with reporter.on("anchor", f"{options.trials} trials at budget {options.anchor}") as advance:
        starts = dict.fromkeys(
            [*family.graph_schedules(options.anchor).values(), uniform_schedule(options.anchor, total)]
        )

        def score(schedule: tuple[int, ...]) -> float:
            return max(trial.score for trial in family.attempts(schedule, "anchor"))

        found = search_anchor(
            score, budget=options.anchor, num_inference_steps=total, starts=list(starts), trials=options.trials,
            seed=options.seed, storage=f"sqlite:///{storage}" if storage else None, progress=advance,
        )  # fmt: skip
        anchor = max(family.attempts(found.schedule, "anchor"), key=lambda trial: trial.score)
        charged("anchor")

    families = [family]
    if options.payload == "auto" and gram is not None:
        families.append(ResidualFamily(calibration, gram, end_to_end=False, forecasts=("reuse", "fitted")))
    trials: dict[int, list[Trial]] = {}
    with reporter.on("interpolate, fit", f"budgets {', '.join(map(str, options.budgets))}") as advance:
        for position, budget in enumerate(options.budgets):
            attempts = _interpolated(family, reference, anchor, budget, options)
            for each in families:
                graphs = list(each.graph_schedules(budget).items())
                for name, schedule in graphs if each is family else graphs[:1]:
                    attempts += each.attempts(schedule, name)
            trials[budget] = sorted(attempts, key=lambda trial: -trial.score)
            advance(position + 1, len(options.budgets))
        charged("interpolate and fit")
    return Found(reference=reference, anchor=anchor, trials=trials, costs=costs)


def _interpolated(family: Family, reference: Trial, anchor: Trial, budget: int, options: CompileOptions) -> list[Trial]:
    """Schedules on the path between the two policies, at several positions around the default law's."""
    default = interpolation_weight(budget, options.reference, options.anchor)
    found: dict[tuple[int, ...], float] = {}
    for weight in dict.fromkeys([default, *candidate_weights(default, count=INTERPOLATION_WEIGHTS)]):
        schedule = interpolated_schedule(
            reference.schedule, anchor.schedule, budget, options.num_inference_steps, weight=weight
        )
        found.setdefault(schedule, float(weight))
    return [trial for schedule, weight in found.items() for trial in family.attempts(schedule, "interpolated", weight)]


def _residual_statistics(calibration: Calibration, options: CompileOptions, reporter: Reporter) -> np.ndarray | None:
    """Gram matrix of the blocks' residuals, or None where the model has none to cache."""
    if calibration.stages is None or not calibration.stages.features:
        if options.payload == "residual":
            raise ModelError(
                "--payload residual: this model's blocks turn no tensor into one of its shape: use --payload output"
            )
        return None
    with reporter.on("residuals", "inner products along a full run") as advance:
        program = program_from_table(calibration.table, payload="residual")
        return residual_gram(
            program, calibration.denoiser, calibration.trajectory.latents[0], calibration.stages, advance
        )


def _meter(calibration: Calibration, costs: dict[str, float], total: int) -> Callable[[str], None]:
    """Charges the evaluations since the last call to a name, in full runs per calibration prompt."""
    spent, per_run = calibration.denoiser.evaluations, total * calibration.trajectory.count
    mark = [spent[0]]

    def charge(name: str) -> None:
        costs[name] = (spent[0] - mark[0]) / per_run
        mark[0] = spent[0]

    return charge


def json_from_found(found: Found) -> dict[str, Any]:
    """A JSON value that `found_from_json` reads back."""

    def trial(value: Trial) -> dict[str, Any]:
        return {**asdict(value), "program": value.program.model_dump(mode="json")}

    return {
        "reference": trial(found.reference), "anchor": trial(found.anchor), "costs": found.costs,
        "trials": {str(budget): [trial(value) for value in values] for budget, values in found.trials.items()},
    }  # fmt: skip


def found_from_json(value: dict[str, Any]) -> Found:
    """The inverse of `json_from_found`."""

    def trial(fields: dict[str, Any]) -> Trial:
        return Trial(
            **{**fields, "program": Program.model_validate(fields["program"]), "schedule": tuple(fields["schedule"])}
        )

    return Found(
        reference=trial(value["reference"]), anchor=trial(value["anchor"]), costs=value["costs"],
        trials={int(budget): [trial(fields) for fields in values] for budget, values in value["trials"].items()},
    )  # fmt: skip
