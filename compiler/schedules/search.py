"""Passes `reference`, `anchor`, `interpolate` and `fit` in their order: calibration set → the best program per budget.

The three stages of OTCache (arXiv 2606.31026): a reference schedule from a graph at a conservative budget, an anchor
from an end-to-end search at an extreme one, and schedules between them by displacement interpolation. The graph's own
schedules at each budget and uniform steps are rolled out as well, the best schedules with other numbers of outputs in
each step too, and the best program is kept; all are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from otcache.schemas.errors import ModelError

from ..calibration.batch import Batch
from ..calibration.fit import Stop
from ..calibration.rollout import residual_gram
from ..calibration.samples import Rows
from ..calibration.trials import MEMORY, Calibration, Schedule, Trial
from ..options import CompileOptions
from ..programs.residual import FORECASTS, Forecast
from ..programs.schedule import uniform_schedule
from ..programs.solver_table import program_from_table
from ..workspace.progress import Pass, Reporter
from .anchor import search_anchor
from .interpolate import candidate_weights, interpolated_schedule, interpolation_weight
from .payloads import OTHER_MEMORIES, RESIDUAL_GRAPHS, Family, OutputFamily, ResidualFamily

RESIDUAL_SAMPLES = 8
"""Calibration samples along whose full runs residuals are weighed where only the residual payload asks for it."""
AUTO_FORECASTS: tuple[Forecast, ...] = ("fitted",)
"""Of the residual payload where `--payload auto` compares it with the output payload."""
REFIT_FORECASTS: tuple[Forecast, ...] = ("reuse", "fitted")
"""Of a schedule of residuals that is made into a program for other samples."""

FIT = "interpolate and fit"
"""Of `Found.costs`: what the budgets take."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A schedule whose policy is one end of the path, and the way that led to it."""

    name: str
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the searches came to. Costs are full runs of T steps per calibration prompt."""

    reference: Chosen
    anchor: Chosen
    trials: dict[int, list[Trial]]
    """Of each budget, the best first."""
    costs: dict[str, float]


FOUND: TypeAdapter[Found] = TypeAdapter(Found)
"""To JSON values and back."""


def search(calibration: Calibration, options: CompileOptions, reporter: Reporter, storage: Path | None = None) -> Found:
    """Run the searches.

    Args:
        calibration: samples, and how schedules are tried on them.
        options: budgets, effort, payload, objective.
        reporter: told of every pass.
        storage: Optuna's database, with which an interrupted anchor search goes on.
    """
    total = calibration.table.num_inference_steps
    meter = _Meter(calibration, total)
    gram = _weigh_residuals(calibration, options, reporter, meter)
    family: Family = OutputFamily(calibration, gram)
    if options.payload == "residual" and gram is not None:
        with reporter.on("edges", options.edge_costs) as current:
            current.expect(meter.at_most("edges", options))
            family = ResidualFamily(calibration, gram, end_to_end=options.edge_costs == "end-to-end")
            meter.charge("edges", current)
    reference = _choose_reference(family, options, reporter, meter)
    anchor = _choose_anchor(family, options, reporter, meter, storage)
    families = [family]
    if options.payload == "auto" and gram is not None:
        families.append(ResidualFamily(calibration, gram, end_to_end=False, forecasts=AUTO_FORECASTS))
    trials: dict[int, list[Trial]] = {}
    count = positions(options, calibration.count, total)
    with reporter.on("interpolate, fit", f"budgets {', '.join(map(str, options.budgets))}") as advance:
        advance.expect(*(meter.at_most(FIT, replace(options, budgets=(each,)), count) for each in options.budgets))
        for position, budget in enumerate(options.budgets):
            attempts = _interpolate(family, reference, anchor, budget, options, count, total)
            if options.limits.uniform:
                attempts += family.attempts(uniform_schedule(budget, total), "uniform")
            for each in families:
                graphs = list(each.graph_schedules(budget).items())[: options.limits.graphs]
                for name, schedule in graphs if each is family else graphs[:1]:
                    attempts += each.attempts(schedule, name)
            trials[budget] = ranked_trials(family, attempts, options.limits.variants)
            advance(position + 1, len(options.budgets))
        meter.charge(FIT, advance)
    return Found(reference=reference, anchor=anchor, trials=trials, costs=meter.costs)


def ranked_trials(family: Family, attempts: Sequence[Trial], count: int) -> list[Trial]:
    """The best first, among them other programs of `count` of the family's best schedules."""
    ranked = sorted(attempts, key=lambda trial: -trial.score)
    own = [trial for trial in ranked if (trial.program.payload == "residual") == isinstance(family, ResidualFamily)]
    distinct: dict[Schedule, Trial] = {}
    for trial in own:
        distinct.setdefault(trial.schedule, trial)
    found = [*ranked, *(other for trial in list(distinct.values())[:count] for other in family.variants(trial))]
    return sorted(found, key=lambda trial: -trial.score)


def _choose_reference(family: Family, options: CompileOptions, reporter: Reporter, meter: _Meter) -> Chosen:
    """The best of the graph's schedules at the reference budget, rolled out where effort allows it."""
    graphs = list(family.graph_schedules(options.reference).items())
    tried = graphs[: options.limits.reference_graphs]
    with reporter.on("reference", f"graph at budget {options.reference}") as advance:
        advance.expect(meter.at_most("reference", options))
        attempts: list[Trial] = []
        for position, (name, schedule) in enumerate(tried):
            attempts += family.attempts(schedule, name)
            advance(position + 1, len(tried))
        meter.charge("reference", advance)
    if not attempts:
        return Chosen(name=graphs[0][0], schedule=graphs[0][1])
    best = max(attempts, key=lambda trial: trial.score)
    return Chosen(name=best.name, schedule=best.schedule)


def _choose_anchor(
    family: Family, options: CompileOptions, reporter: Reporter, meter: _Meter, storage: Path | None
) -> Chosen:
    """The best schedule of the anchor search, or without trials the graph's."""
    total = meter.total
    graphs = family.graph_schedules(options.anchor)
    if not options.trials:
        name, schedule = next(iter(graphs.items()))
        meter.charge("anchor", None)
        return Chosen(name=name, schedule=schedule)
    starts = dict.fromkeys([*graphs.values(), uniform_schedule(options.anchor, total)])

    def score(schedule: Schedule, stop: Stop | None) -> tuple[float, Sequence[float]]:
        best = max(family.attempts(schedule, "anchor", stop=stop), key=lambda trial: trial.score)
        return best.score, best.drifts

    with reporter.on("anchor", f"{options.trials} trials at budget {options.anchor}") as advance:
        advance.expect(meter.at_most("anchor", options))
        result = search_anchor(
            score,
            budget=options.anchor,
            num_inference_steps=total,
            starts=list(starts),
            trials=options.trials,
            seed=options.seed,
            storage=f"sqlite:///{storage}" if storage else None,
            progress=advance,
        )
        for schedule in result.schedules:  # those that Optuna's storage knew are charged as well
            score(schedule, None)
        for schedule, computed in result.pruned:
            meter.calibration.charge_walk(schedule[:computed])
        best = max(family.attempts(result.schedule, "anchor"), key=lambda trial: trial.score)
        meter.charge("anchor", advance)
    return Chosen(name=best.name, schedule=best.schedule)


def refit(found: Found, calibration: Calibration, graphs: int = 0) -> Found:
    """The schedules that were found, as programs for another calibration set. The payload of each budget stays.

    graphs: schedules of that set's own graph that are tried beside each, at most.
    """
    gram: np.ndarray | None = None
    trials: dict[int, list[Trial]] = {}
    for budget, (best, *_) in found.trials.items():
        family: Family = OutputFamily(calibration)
        if best.program.payload == "residual":
            gram = residual_statistics(calibration, RESIDUAL_SAMPLES) if gram is None else gram
            family = ResidualFamily(calibration, gram, end_to_end=False, forecasts=REFIT_FORECASTS)
        attempts = family.attempts(best.schedule, best.name, best.weight)
        for name, schedule in list(family.graph_schedules(budget).items())[:graphs]:
            attempts += family.attempts(schedule, name)
        trials[budget] = ranked_trials(family, attempts, 1)
    return replace(found, trials=trials)


def positions(options: CompileOptions, prompts: int, total: int) -> int:
    """How many positions on the path are tried for each budget: with many budgets fewer, so that a compile keeps to the
    effort's `full_runs`.

    The law's own and the graph's schedules are always tried, so that six budgets and more may take longer. The residual
    payload, which rolls out every forecast of every schedule, keeps to no limit.

    total: T, the evaluations of a full run.
    """
    most = options.limits.weights
    if options.payload == "residual":
        return most
    allowed = (
        count
        for count in range(most, 1, -1)
        if 1.0 + sum(_costs(options, prompts, count, total).values()) <= options.limits.full_runs
    )
    return next(allowed, 1)


def highest_costs(options: CompileOptions, prompts: int, total: int) -> dict[str, float]:
    """What `search` charges at most, in full runs for each of the calibration prompts, before anything is computed.

    It is less where ways lead to the same schedule or share their first steps: these are charged once.
    """
    return _costs(options, prompts, positions(options, prompts, total), total)


def highest_walks(options: CompileOptions, prompts: int, total: int) -> dict[str, int]:
    """Programs that `search` decodes and scores at most, on all calibration prompts, by the same names."""
    residual, effort = options.payload == "residual", options.limits
    each = len(FORECASTS) if residual else 1
    compared = len(AUTO_FORECASTS) if options.payload == "auto" and effort.residual_samples else 0
    schedules = positions(options, prompts, total) + effort.graphs + effort.uniform
    fewer = 0 if residual else effort.variants * len(OTHER_MEMORIES)
    return {
        "reference": effort.reference_graphs * each,
        "anchor": options.trials * each,
        FIT: (schedules * each + compared + fewer) * len(options.budgets),
    }


def _costs(options: CompileOptions, prompts: int, weights: int, total: int) -> dict[str, float]:
    """With so many positions on the path."""
    residual, effort = options.payload == "residual", options.limits
    per_schedule = len(FORECASTS) if residual else 1
    known = 0 if residual else 1  # a walk's first evaluation is the full run's own
    graphs = min(effort.graphs, len(RESIDUAL_GRAPHS)) if residual else effort.graphs

    def runs(schedules: int, budget: int, each: int, known: int = known) -> float:
        distinct = math.comb(total - 1, budget - 1)  # the first step is always computed
        return min(schedules, distinct) * each * (budget - known) / total

    costs = {"residuals": min(1.0, _residual_samples(options) / prompts)}
    if residual:
        replayed = [1 + total - end for start in range(total) for end in range(start + 2, total + 1)]
        costs["edges"] = sum(replayed) / total if options.edge_costs == "end-to-end" else 0.0
    costs["reference"] = runs(effort.reference_graphs, options.reference, per_schedule)
    costs["anchor"] = runs(options.trials, options.anchor, per_schedule)
    costs[FIT] = sum(
        runs(weights + graphs + effort.uniform, budget, per_schedule)
        + (0.0 if residual else effort.variants * _variant_evaluations(budget) / total)
        + (runs(1, budget, len(AUTO_FORECASTS), 0) if options.payload == "auto" and effort.residual_samples else 0.0)
        for budget in options.budgets
    )
    return costs


def _variant_evaluations(budget: int) -> int:
    """Of a schedule's programs with other memories, for each sample: as long as all outputs are weighed, programs share
    them.
    """
    return sum(max(0, budget - 1 - min(memory, MEMORY)) for memory in OTHER_MEMORIES)


def _residual_samples(options: CompileOptions) -> int:
    """Along how many samples' full runs residuals are weighed."""
    if options.payload == "residual":
        return options.limits.residual_samples or RESIDUAL_SAMPLES
    return options.limits.residual_samples


def _interpolate(
    family: Family, reference: Chosen, anchor: Chosen, budget: int, options: CompileOptions, count: int, total: int
) -> list[Trial]:
    """Schedules on the path between the two policies, at `count` positions around the default law's."""
    default = interpolation_weight(budget, options.reference, options.anchor)
    found: dict[Schedule, float] = {}
    for weight in dict.fromkeys([default, *(candidate_weights(default, count=count) if count > 1 else ())]):
        schedule = interpolated_schedule(reference.schedule, anchor.schedule, budget, total, weight=weight)
        found.setdefault(schedule, float(weight))
    return [trial for schedule, weight in found.items() for trial in family.attempts(schedule, "interpolated", weight)]


def _weigh_residuals(
    calibration: Calibration, options: CompileOptions, reporter: Reporter, meter: _Meter
) -> np.ndarray | None:
    """Gram matrix of the blocks' residuals, or None where the model has none to cache, or effort leaves them out."""
    count = _residual_samples(options)
    if not calibration.samples.caches_residuals:
        if options.payload == "residual":
            raise ModelError(
                "--payload residual: this model's blocks turn no tensor into one of its shape: use --payload output"
            )
        count = 0
    if not count:
        meter.charge("residuals", None)
        return None
    with reporter.on("residuals", "inner products along a full run") as advance:
        advance.expect(meter.total * min(count, calibration.count))
        found = residual_statistics(calibration, count, advance)
        meter.charge("residuals", advance)
    return found


def residual_statistics(
    calibration: Calibration, count: int, advance: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Mean inner products float64 (T, T) of the blocks' residuals along full runs of the first `count` samples."""
    program = program_from_table(calibration.table, payload="residual")
    count = min(count, calibration.count)
    evaluations = program.nfe * count

    def weigh(batch: Batch) -> Rows:
        def progress(done: int, total: int) -> None:
            if advance:
                advance(batch.rows.start * total + batch.count * done, count * total)

        return {"gram": residual_gram(batch, program, batch.scratch, progress=progress)}

    def compute() -> tuple[list[list[float]], int]:
        return calibration.samples.map(weigh, slice(count))["gram"].mean(axis=0).tolist(), evaluations

    found = np.array(calibration.ledger.get(["residuals", count], compute))
    calibration.ledger.charge(evaluations)
    return found


class _Meter:
    """Charges what was asked for since the last call to a name, in full runs per calibration prompt.

    The pass is told how many evaluations were made, and how many were found in the workspace or shared.
    """

    def __init__(self, calibration: Calibration, num_inference_steps: int) -> None:
        self.calibration = calibration
        self.costs: dict[str, float] = {}
        self.total = num_inference_steps
        self._per_run = num_inference_steps * calibration.count
        self._mark = calibration.ledger.charged, calibration.ledger.computed

    def at_most(self, name: str, options: CompileOptions, weights: int | None = None) -> float:
        """Evaluations that a name can be charged with, with so many positions on the path."""
        count = self.calibration.count
        weights = positions(options, count, self.total) if weights is None else weights
        return _costs(options, count, weights, self.total)[name] * self._per_run

    def charge(self, name: str, current: Pass | None) -> None:
        """Charge to `name`, and tell the pass."""
        charged, computed = (
            now - before
            for now, before in zip(
                (self.calibration.ledger.charged, self.calibration.ledger.computed), self._mark, strict=True
            )
        )
        self.costs[name] = charged / self._per_run
        if current is not None:
            current.facts["evaluations"] = computed
            current.facts["evaluations_reused"] = max(0, charged - computed)
        self._mark = self.calibration.ledger.charged, self.calibration.ledger.computed
