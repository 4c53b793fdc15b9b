"""Schedules that a library or a forecast may be given: every way to one that is measured here, at any budget."""

from __future__ import annotations

from ..programs.residual import residual_edge_errors
from ..programs.schedule import uniform_schedule
from ..schedules.gram import statistics_from_grams
from ..schedules.reference import Power, graph_schedules, shortest_schedule
from .lemica import lemica_schedules
from .meancache import meancache_schedules
from .method import Bench, NotApplicable
from .paper import paper_schedule, residual_statistics_of

Schedule = tuple[int, ...]


def candidate_schedules(bench: Bench, budget: int) -> dict[str, Schedule]:
    """Distinct schedules of `budget` steps by the way that leads to them, as far as the model has it.

    Uniform steps; the paths of LeMiCa, of MeanCache, of residuals and of outputs; the paper's; the default's own.
    """
    ways = (_uniform, _own, _outputs, _residuals, _paper, lemica_schedules, meancache_schedules)
    found: dict[str, Schedule] = {}
    for way in ways:
        try:
            schedules = way(bench, budget)
        except (NotApplicable, ValueError):  # the way is not there for this model, or finds no path
            continue
        for name, schedule in schedules.items():
            if schedule not in found.values():
                found[name] = tuple(schedule)
    return found


def _uniform(bench: Bench, budget: int) -> dict[str, Schedule]:
    return {"uniform": tuple(uniform_schedule(budget, bench.table.num_inference_steps))}


def _own(bench: Bench, budget: int) -> dict[str, Schedule]:
    return {"otcache": bench.own[budget]} if budget in bench.own else {}


def _outputs(bench: Bench, budget: int) -> dict[str, Schedule]:
    samples = bench.calibration.samples
    statistics = statistics_from_grams(samples.trajectory_gram(), samples.elements)
    return {f"outputs, {name}": schedule for name, schedule in graph_schedules(statistics, budget).items()}


def _residuals(bench: Bench, budget: int) -> dict[str, Schedule]:
    errors = residual_edge_errors(bench.table, residual_statistics_of(bench))
    return {
        "residuals, graph power 4": shortest_schedule(errors, budget, Power(4.0)),
        "residuals, graph power 1": shortest_schedule(errors, budget, Power(1.0)),
    }


def _paper(bench: Bench, budget: int) -> dict[str, Schedule]:
    return {"otcache (paper)": paper_schedule(bench, budget).schedule}
