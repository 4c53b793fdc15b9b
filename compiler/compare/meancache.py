"""MeanCache (arXiv 2601.19961): velocities between computed steps forecast by average velocities, on a shortest path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from otcache.schemas.program import Program

from ..programs.solver_table import SolverTable, step_from_table
from ..schedules.gram import TrajectoryStatistics, statistics_from_grams
from ..schedules.reference import Power, shortest_schedule
from .method import Bench, Built, NotApplicable, ProgramMethod

JVP_ORDERS = (1, 2, 3, 4, 5, 6)
"""Steps behind an edge over which MeanCache may take its derivative, as in its released schedules."""


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


def meancache_edges(table: SolverTable, statistics: TrajectoryStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors (T, T+1) of MeanCache's forecast along the full run, and the order that gives each; no
    evaluations.

    Only orders whose history lies behind the edge's start are weighed with the full run's own outputs.
    """
    total = table.num_inference_steps
    sigmas = _flow_sigmas(table)
    gram = statistics.gram[total + 1 :, total + 1 :]
    errors = np.full((total, total + 1), np.inf)
    orders = np.ones((total, total + 1), dtype=int)
    moves = np.diff(sigmas)
    for start in range(total):
        history = np.eye(start + 1, total)
        for order in JVP_ORDERS if start else JVP_ORDERS[:1]:
            rows = mean_velocity_coefs(sigmas, start, total, order, history)
            gaps = rows - np.eye(total)
            moved = np.cumsum(moves[start:, None] * gaps[start:], axis=0)
            costs = np.einsum("em,mn,en->e", moved, gram, moved)
            better = costs < errors[start, start + 1 :]
            errors[start, start + 1 :] = np.where(better, np.maximum(costs, 0.0), errors[start, start + 1 :])
            orders[start, start + 1 :] = np.where(better, order, orders[start, start + 1 :])
    return errors, orders


def meancache_program(table: SolverTable, schedule: Sequence[int], orders: np.ndarray) -> Program:
    """MeanCache's forecast between the computed steps of a flow sampler, folded into one update for each."""
    sigmas = _flow_sigmas(table)
    ends = [*schedule[1:], table.num_inference_steps]
    rows = np.zeros((0, len(schedule)))
    steps = []
    for position, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        rows = np.concatenate([rows, np.eye(len(schedule))[position : position + 1]])
        rows = mean_velocity_coefs(sigmas, start, end, int(orders[start, end]), rows)
        move = np.diff(sigmas)[start:end] @ rows[start:end]
        steps.append(step_from_table(table, start, 1.0, move[: position + 1]))
    return Program(payload="output", steps=tuple(steps))


def _flow_sigmas(table: SolverTable) -> np.ndarray:
    """Sigmas (T+1,) of a sampler whose every step is Euler's on a flow, as MeanCache's; else NotApplicable."""
    if table.sigmas is None or table.prediction_type != "flow_prediction":
        raise NotApplicable(f"MeanCache forecasts velocities of flow matching: {table.scheduler} has none")
    moves = np.diff(table.sigmas)
    if not (np.allclose(table.latent_coefs, 1.0) and np.allclose(table.output_coefs, np.diag(moves), atol=1e-5)):
        raise NotApplicable(f"MeanCache's schedule is for Euler steps: {table.scheduler} takes others")
    return np.asarray(table.sigmas)


def _build(bench: Bench, budget: int) -> Built:
    samples = bench.calibration.samples
    statistics = statistics_from_grams(samples.trajectory_gram(), samples.elements)
    errors, orders = meancache_edges(bench.table, statistics)
    schedule = shortest_schedule(errors, budget, Power(4.0))
    return Built(program=meancache_program(bench.table, schedule, orders))


METHODS = (ProgramMethod(name="meancache", group="schedule", source="arXiv 2601.19961", build=_build),)
