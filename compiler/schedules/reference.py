"""Pass `reference`: trajectory statistics → Schedule, the cheapest path of exactly B jumps from step 0 to step T.

Nodes are steps, edges are jumps over the steps that are not computed. An edge costs the error of the best prediction of
where it lands, in closed form from the Gram matrix; a predictor that also weighs the output before makes the cost of an
edge depend on the edge before, so the state is the pair (previous, current). Edge errors are mean squares per element.
Objectives: Σ rms^γ (MeanCache, arXiv 2601.19961, uses γ = 4) and the lexicographic minimax of LeMiCa (arXiv
2511.00090).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .gram import FloatArray, TrajectoryStatistics

RIDGE = 1e-12
"""Of the regressors' own size: keeps nearly parallel outputs from dividing by zero."""
LONGEST_PAIR_TIMELINE = 200
"""Steps above which pairs (T³ numbers) and minimax (seconds to minutes) are left out."""
Schedule = tuple[int, ...]


@dataclass(frozen=True)
class Power:
    """Minimise Σ rms^exponent."""

    exponent: float


@dataclass(frozen=True)
class Minimax:
    """Minimise the largest error, then the second largest, and so on."""


Objective = Power | Minimax


def edge_errors(statistics: TrajectoryStatistics) -> FloatArray:
    """Squared errors float64 (T, T+1) of X_j ≈ a X_i + w V_i, the best a and w for each edge i → j; inf where j ≤ i."""
    total = statistics.num_inference_steps
    errors = np.full((total, total + 1), np.inf)
    for start in range(total):
        regressors = [statistics.latent(start), statistics.output(start)]
        errors[start, start + 1 :] = _residuals(statistics.gram, regressors, range(start + 1, total + 1))
    return errors


def pair_edge_errors(statistics: TrajectoryStatistics) -> FloatArray:
    """Squared errors float64 (T, T, T+1) of X_j ≈ a X_i + w V_i + u V_h, h < i < j the step computed before;
    else inf.
    """
    total = statistics.num_inference_steps
    errors = np.full((total, total, total + 1), np.inf)
    for start in range(1, total):
        for before in range(start):
            regressors = [statistics.latent(start), statistics.output(start), statistics.output(before)]
            errors[before, start, start + 1 :] = _residuals(statistics.gram, regressors, range(start + 1, total + 1))
    return errors


def end_to_end_edge_errors(replay: Callable[[int, int], float], num_inference_steps: int) -> FloatArray:
    """LeMiCa's edges: `replay(i, j)` is the squared error at the end when the steps between i and j are skipped."""
    total = num_inference_steps
    errors = np.full((total, total + 1), np.inf)
    for start in range(total):
        for end in range(start + 1, total + 1):
            errors[start, end] = replay(start, end) if end > start + 1 else 0.0
    return errors


def _residuals(gram: FloatArray, regressors: list[int], targets: range) -> FloatArray:
    """Squared distances of several rows' vectors from the span of the regressors."""
    block = gram[np.ix_(regressors, regressors)]
    sizes = np.diag(block)
    block = block + np.diag(np.where(sizes > 0, RIDGE * sizes, 1.0))
    cross = gram[np.ix_(regressors, list(targets))]
    weights = np.linalg.solve(block, cross)
    squares = np.diag(gram)[list(targets)] - 2 * (weights * cross).sum(0)
    squares = squares + np.einsum("rt,rs,st->t", weights, gram[np.ix_(regressors, regressors)], weights)
    return np.maximum(squares, 0.0)


def shortest_schedule(
    errors: FloatArray, budget: int, objective: Objective, pair_errors: FloatArray | None = None
) -> Schedule:
    """The steps of the cheapest path 0 → T with exactly `budget` edges.

    With `pair_errors` the first edge costs `errors` and every later one depends on the step before as well; the path is
    then exact over pairs. Edges whose error is not finite are not taken. Raises ValueError unless 1 ≤ budget ≤ T, and
    where no path is left.
    """
    total = errors.shape[0]
    if not 1 <= budget <= total:
        raise ValueError(f"budget is {budget}: expected 1 … {total}")
    if isinstance(objective, Minimax):
        costs, pair_costs = _rank(errors, pair_errors, budget)
    else:
        costs = np.where(
            np.isfinite(errors), np.sqrt(np.where(np.isfinite(errors), errors, 0)) ** objective.exponent, np.inf
        )
        pair_costs = None
        if pair_errors is not None:
            finite = np.isfinite(pair_errors)
            pair_costs = np.where(finite, np.sqrt(np.where(finite, pair_errors, 0)) ** objective.exponent, np.inf)
    if isinstance(objective, Minimax):
        path = _minimax_path(costs, budget, pair_costs)
    else:
        path = _power_path(costs, budget) if pair_costs is None else _power_pair_path(costs, pair_costs, budget)
    if not _is_finite(path, costs, pair_costs):
        raise ValueError(
            f"edge errors: no path of {budget} edges from step 0 to {total} has finite errors; expected at least one: "
            "check the recorded run for values that are not finite"
        )
    return path


def _is_finite(path: Schedule, costs: FloatArray, pair_costs: FloatArray | None) -> bool:
    nodes = [*path, costs.shape[0]]
    if len(nodes) < 2 or not np.isfinite(costs[nodes[0], nodes[1]]):
        return False
    return all(
        np.isfinite(costs[node, end] if pair_costs is None else pair_costs[before, node, end])
        for before, node, end in zip(nodes, nodes[1:], nodes[2:], strict=False)
    )


def _power_path(costs: FloatArray, budget: int) -> Schedule:
    total = costs.shape[0]
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for _ in range(budget):
        through = best[:total, None] + costs
        chosen.append(through.argmin(axis=0))
        best = through.min(axis=0)
    node, path = total, []
    for step in reversed(chosen):
        node = int(step[node])
        path.append(node)
    return tuple(reversed(path))


def _power_pair_path(costs: FloatArray, pair_costs: FloatArray, budget: int) -> Schedule:
    total = costs.shape[0]
    if budget == 1:
        return (0,)
    best = np.full((total, total + 1), np.inf)
    best[0] = costs[0]
    chosen = []
    for _ in range(budget - 1):
        through = best[:, :total, None] + pair_costs
        chosen.append(through.argmin(axis=0))
        best = through.min(axis=0)
    previous = int(best[:, total].argmin())
    node, path = total, []
    for step in reversed(chosen):
        path.append(previous)
        previous, node = int(step[previous, node]), previous
    path.append(previous)
    return tuple(reversed(path))


def _rank(errors: FloatArray, pair_errors: FloatArray | None, budget: int) -> tuple[FloatArray, FloatArray | None]:
    """Errors replaced by their ranks among all errors: the order is all that minimax looks at."""
    parts = [errors] if pair_errors is None else [errors, pair_errors]
    values = np.unique(np.concatenate([part[np.isfinite(part)] for part in parts]))

    def rank(part: FloatArray) -> FloatArray:
        return np.where(np.isfinite(part), np.searchsorted(values, np.where(np.isfinite(part), part, 0)), np.inf)

    return rank(errors), None if pair_errors is None else rank(pair_errors)


def _minimax_path(costs: FloatArray, budget: int, pair_costs: FloatArray | None) -> Schedule:
    """Exact: the largest cost is fixed to its least value, then the second largest, and so on.

    Adding the same edge to two multisets keeps their order (largest first), so one best path per state is enough.
    """
    total = costs.shape[0]
    Ranked = tuple[tuple[float, ...], tuple[int, ...]]
    states: dict[tuple[int, int], Ranked] = {}
    for end in range(1, total + 1):
        if np.isfinite(costs[0, end]):
            states[0, end] = ((costs[0, end],), (0,))
    for used in range(1, budget):
        following: dict[tuple[int, int], Ranked] = {}
        for (before, node), (cost, path) in states.items():
            if node == total:
                continue
            row = costs[node] if pair_costs is None else pair_costs[before, node]
            for end in range(node + 1, total - (budget - used - 1) + 1):
                if end < total and used == budget - 1:
                    continue
                extended = tuple(sorted((*cost, row[end]), reverse=True))
                key = (node if pair_costs is not None else -1, end)
                if key not in following or (extended, (*path, node)) < following[key]:
                    following[key] = (extended, (*path, node))
        states = following
    return min((value for (_, end), value in states.items() if end == total), default=((), ()))[1]


def graph_schedules(statistics: TrajectoryStatistics, budget: int) -> dict[str, Schedule]:
    """Shortest paths under several objectives and memories, best guesses first; equal paths are listed once."""
    errors = edge_errors(statistics)
    ways: dict[str, tuple[Objective, FloatArray | None]] = {"graph power 4": (Power(4.0), None)}
    if statistics.num_inference_steps <= LONGEST_PAIR_TIMELINE:
        pairs = pair_edge_errors(statistics)
        ways["graph power 2, pairs"] = Power(2.0), pairs
        ways["graph minimax"] = Minimax(), None
    else:
        ways["graph power 2"] = Power(2.0), None
    found: dict[str, Schedule] = {}
    for name, (objective, pair_errors) in ways.items():
        schedule = shortest_schedule(errors, budget, objective, pair_errors)
        if schedule not in found.values():
            found[name] = schedule
    return found
