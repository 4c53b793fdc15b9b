"""The paper's claim: does a schedule between two policies match a search of its own for each budget?

Consumes the searches' result; produces a `Claim` per budget and way. All ways share the closed-loop fit, so that they
differ in the schedule alone; the searches are given about what interpolation took, and ten times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..calibration.fit import Stop
from ..calibration.outcomes import quality_of
from ..calibration.trials import Trial
from ..passes.prepare import Prepared
from ..programs.schedule import uniform_schedule
from ..schedules.anchor import search_anchor
from ..schedules.interpolate import interpolated_schedule
from ..schedules.payloads import OutputFamily
from ..schedules.policy import policy_from_schedule, wasserstein_distance
from ..schedules.search import Found
from .cells import Claim
from .method import Bench

SEARCHES = (8, 80)
"""Trials of the searches per budget: about what interpolation took, and ten times that."""

Schedule = tuple[int, ...]


def interpolation_claims(prepared: Prepared, bench: Bench, found: Found) -> list[Claim]:
    """Every way at every budget, on held-out prompts; from the workspace where it was measured before."""
    claims: list[Claim] = []
    options = prepared.session.options
    with prepared.session.reporter.on("claim", "interpolated, graph and searched schedules") as advance:
        for position, budget in enumerate(options.budgets):
            policies = [list(found.reference.schedule), list(found.anchor.schedule)]
            key = [bench.key, prepared.session.margin, budget, *policies, list(SEARCHES), options.objective]
            rows = bench.workspace.json("claim", key, lambda b=budget: _claims_at(prepared, bench, found, b))  # type: ignore[misc]
            claims += [Claim(**{**row, "schedule": tuple(row["schedule"])}) for row in rows]
            advance(position + 1, len(options.budgets))
    return claims


def _claims_at(prepared: Prepared, bench: Bench, found: Found, budget: int) -> list[dict[str, Any]]:
    calibration, total = prepared.calibration, bench.table.num_inference_steps
    law = interpolated_schedule(found.reference.schedule, found.anchor.schedule, budget, total)
    law_policy = policy_from_schedule(law, total)
    graph = next(iter(OutputFamily(calibration).graph_schedules(budget).values()))

    def score(schedule: Schedule, stop: Stop) -> tuple[float, Sequence[float]]:
        trial = calibration.fit(schedule, stop=stop)
        return trial.score, trial.drifts

    def search(trials: int) -> Trial:
        result = search_anchor(
            score,
            budget=budget,
            num_inference_steps=total,
            starts=[graph, uniform_schedule(budget, total)],
            trials=trials,
            seed=prepared.session.options.seed,
        )
        return calibration.fit(result.schedule)

    ways: dict[str, tuple[Callable[[], Trial], int]] = {
        "interpolated, law in 1/B": (lambda: calibration.fit(law), 1),
        "graph": (lambda: calibration.fit(graph), 1),
    }
    for trials in SEARCHES:
        ways[f"search, {trials} trials"] = (lambda trials=trials: search(trials)), trials  # type: ignore[misc]
    if interpolated := [trial for trial in found.trials[budget] if trial.name == "interpolated"]:
        ways["interpolated, best weight"] = (lambda: interpolated[0]), len(interpolated)
    rows = []
    for way, (make, rollouts) in ways.items():
        trial = make()
        quality = quality_of(bench.evaluation, trial.program)
        distance = wasserstein_distance(policy_from_schedule(trial.schedule, total), law_policy)
        claim = Claim(
            budget=budget,
            way=way,
            schedule=tuple(trial.schedule),
            psnr_db=quality.psnr_db.mean,
            ssim=quality.ssim.mean,
            rollouts=rollouts,
            w2_to_interpolated=distance,
        )
        rows.append(asdict(claim))
    return rows
