"""Edges against direct least squares, paths against all schedules there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from otcache.compiler.schedules.gram import statistics_from_grams
from otcache.compiler.schedules.reference import (
    Minimax,
    Power,
    edge_errors,
    end_to_end_edge_errors,
    graph_schedules,
    pair_edge_errors,
    shortest_schedule,
)


def trajectory(total=7, samples=3, size=12, seed=0):
    random = np.random.default_rng(seed)
    outputs = random.normal(size=(total, samples, size))
    latents = np.concatenate(
        [random.normal(size=(1, samples, size)), outputs + 0.2 * random.normal(size=outputs.shape)]
    )
    return np.cumsum(latents, axis=0), outputs


def statistics_of(latents, outputs):
    """Of latents (T+1, n, d) and outputs (T, n, d)."""
    rows = np.concatenate([latents, outputs])
    return statistics_from_grams(np.einsum("rnd,snd->nrs", rows, rows), rows.shape[2])


def least_squares(target, regressors):
    matrix = np.stack([r.ravel() for r in regressors], axis=1)
    weights = np.linalg.lstsq(matrix, target.ravel(), rcond=None)[0]
    return np.mean((target.ravel() - matrix @ weights) ** 2)


def test_gram_is_the_mean_inner_product():
    latents, outputs = trajectory()
    statistics = statistics_of(latents, outputs)
    assert statistics.num_inference_steps == 7
    assert statistics.gram[2, 5] == pytest.approx(np.mean(latents[2] * latents[5]))
    assert statistics.gram[3, statistics.output(4)] == pytest.approx(np.mean(latents[3] * outputs[4]))
    with pytest.raises(ValueError, match="expected"):
        statistics_of(latents[:-1], outputs)  # an even number of rows


def test_edges_are_least_squares_errors():
    latents, outputs = trajectory()
    statistics = statistics_of(latents, outputs)
    errors, pairs = edge_errors(statistics), pair_edge_errors(statistics)
    for i, j in itertools.combinations(range(8), 2):
        assert errors[i, j] == pytest.approx(least_squares(latents[j], [latents[i], outputs[i]]), rel=1e-5, abs=1e-9)
        for h in range(i):
            expected = least_squares(latents[j], [latents[i], outputs[i], outputs[h]])
            assert pairs[h, i, j] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert np.isinf(errors[3, 3]) and np.isinf(pairs[4, 3, 6])


def path_errors(schedule, errors, pairs):
    nodes = [*schedule, errors.shape[0]]
    found = [errors[nodes[0], nodes[1]]]
    for before, node, end in zip(nodes, nodes[1:], nodes[2:], strict=False):
        found.append(errors[node, end] if pairs is None else pairs[before, node, end])
    return np.sqrt(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("budget", range(1, 8))
def test_paths_equal_brute_force(seed, with_pairs, budget):
    statistics = statistics_of(*trajectory(seed=seed))
    errors = edge_errors(statistics)
    pairs = pair_edge_errors(statistics) if with_pairs else None
    every = [(0, *rest) for rest in itertools.combinations(range(1, 7), budget - 1)]
    for gamma in (1.0, 2.0, 4.0):
        cost = {s: np.sum(path_errors(s, errors, pairs) ** gamma) for s in every}
        found = shortest_schedule(errors, budget, Power(gamma), pairs)
        assert len(found) == budget and cost[found] == pytest.approx(min(cost.values()))
    ranked = {s: sorted(path_errors(s, errors, pairs), reverse=True) for s in every}
    found = shortest_schedule(errors, budget, Minimax(), pairs)
    assert ranked[found] == min(ranked.values())


def test_end_to_end_edges_replay_only_jumps():
    asked = []
    errors = end_to_end_edge_errors(lambda i, j: asked.append((i, j)) or float((j - i) ** 2), 5)
    assert len(asked) == len(set(asked)) == 5 * 4 // 2
    assert errors[1, 2] == 0 and errors[0, 5] == 25
    assert shortest_schedule(errors, 5, Minimax()) == (0, 1, 2, 3, 4)


def test_graph_schedules_are_distinct_and_have_the_budget():
    statistics = statistics_of(*trajectory(total=12))
    for budget in (1, 3, 6, 12):
        found = graph_schedules(statistics, budget)
        assert all(len(schedule) == budget for schedule in found.values())
        assert len(set(found.values())) == len(found) >= 1


def test_an_output_of_zeros_tells_nothing_and_breaks_nothing():
    latents, outputs = trajectory()
    outputs[3] = 0.0
    statistics = statistics_of(latents, outputs)
    errors, pairs = edge_errors(statistics), pair_edge_errors(statistics)
    assert errors[3, 5] == pytest.approx(least_squares(latents[5], [latents[3]]), rel=1e-5)
    assert not np.isnan(errors).any() and not np.isnan(pairs).any()


@pytest.mark.parametrize("objective", [Power(4.0), Minimax()])
@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("missing", ["last", "first"])
def test_errors_that_leave_no_path_are_refused(objective, with_pairs, missing):
    statistics = statistics_of(*trajectory())
    errors, pairs = edge_errors(statistics), pair_edge_errors(statistics)
    if missing == "last":
        errors[:, -1], pairs[:, :, -1] = np.nan, np.nan
    else:
        errors[0] = np.nan
    with pytest.raises(ValueError, match="no path of 3 edges from step 0 to 7 has finite errors"):
        shortest_schedule(errors, 3, objective, pairs if with_pairs else None)


@pytest.mark.parametrize("objective", [Power(4.0), Minimax()])
def test_edges_that_are_not_finite_are_avoided(objective):
    errors = edge_errors(statistics_of(*trajectory()))
    errors[0, 3] = np.nan
    every = [(0, *rest) for rest in itertools.combinations(range(1, 7), 2) if rest[0] != 3]
    if isinstance(objective, Minimax):
        expected = min(every, key=lambda s: sorted(path_errors(s, errors, None), reverse=True))
    else:
        expected = min(every, key=lambda s: np.sum(path_errors(s, errors, None) ** 4))
    assert shortest_schedule(errors, 3, objective) == expected


def test_budget_outside_the_timeline_is_refused():
    errors = edge_errors(statistics_of(*trajectory()))
    for budget in (0, 8):
        with pytest.raises(ValueError, match=f"budget is {budget}: expected 1 … 7"):
            shortest_schedule(errors, budget, Power(4.0))
