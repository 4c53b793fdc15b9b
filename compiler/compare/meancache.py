"""MeanCache (arXiv 2601.19961): velocities forecast by average velocities, on a shortest path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from otcache.schemas.program import Program

from ..calibration.batch import Batch
from ..calibration.samples import Rows
from ..programs.solver_table import SolverTable, step_from_table
from ..schedules.gram import TrajectoryStatistics, statistics_from_grams
from ..schedules.reference import Power, shortest_schedule
from .method import Bench, Built, NotApplicable, ProgramMethod, choose_program, schedule_text

JVP_ORDERS = (1, 2, 3, 4, 5, 6)
"""Steps behind an edge over which MeanCache may take its derivative, as in its released schedules."""
CAPS = (1, 2, 6)
"""Highest orders that are tried."""
ELEMENTS = 1 << 16
"""Of a sample's latents that are weighed at most."""


def mean_velocity_coefs(sigmas: np.ndarray, start: int, end: int, order: int, history: np.ndarray) -> np.ndarray:
    """Outputs at steps start+1 … end−1 as MeanCache forecasts them (arXiv 2601.19961, equation of its average
    velocity).

    v_s = v_{s−1} − J·(σ_{s+1} − σ_s) with J = (v_r − u_{r→s}) / (σ_s − σ_r), r = s − order, u the average velocity from
    r to s.

    history: coefficients float64 (steps up to start, m) of every output so far in m computed outputs.
    Returns the rows float64 (end, m) of history and forecasts together.
    """
    rows = list(history)
    for step in range(start + 1, end):
        first = max(0, step - order)
        span = sigmas[step] - sigmas[first]
        average = sum((sigmas[m + 1] - sigmas[m]) * rows[m] for m in range(first, step)) / span
        derivative = (rows[first] - average) / span
        rows.append(rows[step - 1] - derivative * (sigmas[step + 1] - sigmas[step]))
    return np.stack(rows)


def forecast_gaps(sigmas: np.ndarray, start: int, order: int) -> np.ndarray:
    """How far MeanCache is from the full run after each step of an edge, float64 (T − start, T) in the outputs V.

    Row e is the weights of V_0 … V_{T−1} in the displacement from `start` to start + 1 + e that is missed, along the
    full run.
    """
    total = len(sigmas) - 1
    rows = mean_velocity_coefs(sigmas, start, total, order, np.eye(start + 1, total))
    gaps: np.ndarray = np.cumsum(np.diff(sigmas)[start:, None] * (rows - np.eye(total))[start:], axis=0)
    return gaps


def orders_at(start: int, cap: int) -> tuple[int, ...]:
    """Orders that an edge may take, whose history is true there: those of the release, up to `cap`."""
    return tuple(order for order in JVP_ORDERS if order <= cap) if start else (1,)


Costs = dict[int, np.ndarray]
"""By order, cost (T, T+1) of every edge; not finite where there is none."""


def displacement_costs(table: SolverTable, statistics: TrajectoryStatistics) -> Costs:
    """Squared errors of where MeanCache's edges end along the full run; no evaluations."""
    total, sigmas = table.num_inference_steps, flow_sigmas(table)
    gram = statistics.gram[total + 1 :, total + 1 :]
    costs = {order: np.full((total, total + 1), np.inf) for order in JVP_ORDERS}
    for start in range(total):
        for order in orders_at(start, max(JVP_ORDERS)):
            gaps = forecast_gaps(sigmas, start, order)
            costs[order][start, start + 1 :] = np.maximum(np.einsum("em,mn,en->e", gaps, gram, gaps), 0.0)
    return costs


def average_velocity_errors(table: SolverTable) -> Callable[[Batch], Rows]:
    """For a batch: `errors` (m, orders, T, T+1), the published cost: mean absolute errors of average velocities.

    Outputs are read off the latents, of which at most `ELEMENTS` of a sample, chosen once, are weighed.
    """
    total, sigmas = table.num_inference_steps, flow_sigmas(table)
    moves = np.diff(sigmas)

    def answer(batch: Batch) -> Rows:
        size = math.prod(batch.runs.latents_shape)
        chosen = np.sort(np.random.default_rng(0).choice(size, min(size, ELEMENTS), replace=False))
        errors = np.full((batch.count, len(JVP_ORDERS), total, total + 1), np.inf)
        steps = [batch.runs.latents(batch.rows, i).reshape(batch.count, -1)[:, chosen] for i in range(total + 1)]
        latents = np.stack(steps, axis=1).astype(np.float64)
        for row in range(batch.count):
            outputs = np.diff(latents[row], axis=0) / moves[:, None]
            for start in range(total):
                spans = (sigmas[start + 1 :] - sigmas[start])[:, None]
                for order in orders_at(start, max(JVP_ORDERS)):
                    missed = (forecast_gaps(sigmas, start, order) / spans) @ outputs
                    errors[row, JVP_ORDERS.index(order), start, start + 1 :] = np.abs(missed).mean(axis=1)
        return {"errors": errors}

    return answer


def cheapest_orders(costs: Costs, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs (T, T+1) of edges by their best order up to `cap`, and those orders."""
    orders = [order for order in JVP_ORDERS if order <= cap]
    stacked = np.stack([costs[order] for order in orders])
    return stacked.min(axis=0), np.asarray(orders)[stacked.argmin(axis=0)]


def meancache_costs(bench: Bench) -> dict[str, Costs]:
    """Of edges, as squares: of the displacement, and the published one, of average velocities. Raises NotApplicable."""
    flow_sigmas(bench.table)
    samples = bench.calibration.samples
    statistics = statistics_from_grams(samples.trajectory_gram(), samples.elements)

    def compute() -> dict[str, np.ndarray]:
        answer = average_velocity_errors(bench.table)
        return {"errors": samples.map(answer, bench.tuning)["errors"].mean(axis=0)}

    published = bench.workspace.arrays("meancache", [bench.key, bench.tuning.stop], compute)["errors"]
    return {
        "displacement": displacement_costs(bench.table, statistics),
        "average velocity": {order: published[index] ** 2 for index, order in enumerate(JVP_ORDERS)},
    }


def meancache_schedules(bench: Bench, budget: int) -> dict[str, tuple[int, ...]]:
    """The path of each cost with orders up to each cap. Raises NotApplicable."""
    return {
        f"meancache, {name}, orders to {cap}": shortest_schedule(cheapest_orders(costs, cap)[0], budget, Power(4.0))
        for name, costs in meancache_costs(bench).items()
        for cap in CAPS
    }


def meancache_program(table: SolverTable, schedule: Sequence[int], orders: np.ndarray) -> Program:
    """MeanCache's forecast between the computed steps of a flow sampler, folded into one update for each."""
    sigmas = flow_sigmas(table)
    ends = [*schedule[1:], table.num_inference_steps]
    rows = np.zeros((0, len(schedule)))
    steps = []
    for position, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        rows = np.concatenate([rows, np.eye(len(schedule))[position : position + 1]])
        rows = mean_velocity_coefs(sigmas, start, end, int(orders[start, end]), rows)
        move = np.diff(sigmas)[start:end] @ rows[start:end]
        steps.append(step_from_table(table, start, 1.0, move[: position + 1]))
    return Program(payload="output", steps=tuple(steps))


def flow_sigmas(table: SolverTable) -> np.ndarray:
    """Sigmas (T+1,) of a sampler whose every step is Euler's on a flow, as MeanCache's; else NotApplicable."""
    if table.sigmas is None or table.prediction_type != "flow_prediction":
        raise NotApplicable(f"MeanCache forecasts velocities of flow matching: {table.scheduler} has none")
    moves = np.diff(table.sigmas)
    if not (np.allclose(table.latent_coefs, 1.0) and np.allclose(table.output_coefs, np.diag(moves), atol=1e-5)):
        raise NotApplicable(f"MeanCache's schedule is for Euler steps: {table.scheduler} takes others")
    return np.asarray(table.sigmas)


def _build(bench: Bench, budget: int) -> Built:
    """Costs assume a true history, and roll-outs feed on forecasts: calibration says how high an order may be."""
    candidates = []
    for name, costs in meancache_costs(bench).items():
        for cap in CAPS:
            errors, orders = cheapest_orders(costs, cap)
            schedule = shortest_schedule(errors, budget, Power(4.0))
            program = meancache_program(bench.table, schedule, orders)
            setting = f"{name}, orders to {cap}, {schedule_text(schedule)}"
            candidates.append(Built(program=program, setting=setting))
    return choose_program(bench, candidates)


PUBLISHED = (10, 50)
"""About the least that paper and release show, by an audit of the first comparison."""

METHODS = (
    ProgramMethod(name="meancache", group="schedule", source="arXiv 2601.19961", build=_build, published=PUBLISHED),
)
