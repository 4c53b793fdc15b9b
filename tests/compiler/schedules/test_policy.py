"""Policies against an independent quantile oracle in numpy, and the identities of one-dimensional transport."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.schedules.interpolate import candidate_weights, interpolated_schedule, interpolation_weight
from otcache.compiler.schedules.policy import (
    displacement_interpolation,
    full_policy,
    policy_from_schedule,
    schedule_from_policy,
    transport_plan,
    wasserstein_distance,
)


@st.composite
def schedules(draw, total: int = 40):
    steps = draw(st.sets(st.integers(1, total - 1), max_size=total - 1))
    return (0, *sorted(steps))


def oracle_distance(first, second, total, order=2, cells=200_000):
    """W_p by direct integration of |Q_1 − Q_2|^p, quantile functions written out segment by segment."""
    levels = (np.arange(cells) + 0.5) / cells

    def quantile(schedule):
        ends = np.array([*schedule, total]) / total
        segment = np.minimum((levels * len(schedule)).astype(int), len(schedule) - 1)
        within = levels * len(schedule) - segment
        return ends[segment] + within * (ends[segment + 1] - ends[segment])

    return float(np.mean(np.abs(quantile(first) - quantile(second)) ** order) ** (1 / order))


@given(schedules(), schedules(), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_pot_agrees_with_numpy(first, second, order):
    found = wasserstein_distance(policy_from_schedule(first, 40), policy_from_schedule(second, 40), order)
    assert found == pytest.approx(oracle_distance(first, second, 40, order), abs=2e-5)


@given(schedules(), schedules(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_w2_is_additive_along_the_path(first, second, alpha, beta):
    start, end = policy_from_schedule(first, 40), policy_from_schedule(second, 40)
    here, there = displacement_interpolation(start, end, alpha), displacement_interpolation(start, end, beta)
    assert wasserstein_distance(here, there) == pytest.approx(
        abs(alpha - beta) * wasserstein_distance(start, end), abs=1e-6
    )


@given(schedules(), schedules(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_interpolated_quantile_functions_are_monotone_between_zero_and_one(first, second, alpha):
    policy = displacement_interpolation(policy_from_schedule(first, 40), policy_from_schedule(second, 40), alpha)
    assert np.all(np.diff(policy.positions) >= -1e-15)
    assert policy.quantile([0.0, 1.0]).tolist() == [0.0, 1.0]


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_a_schedule_is_its_policy_at_its_own_budget(schedule):
    assert schedule_from_policy(policy_from_schedule(schedule, 40), len(schedule), 40) == schedule


@given(schedules(), schedules(), st.integers(1, 40), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_every_budget_gets_exactly_its_steps(reference, anchor, budget, weight):
    schedule = interpolated_schedule(reference, anchor, budget, 40, weight=weight)
    assert len(schedule) == budget and schedule[0] == 0 and schedule[-1] < 40
    assert all(before < after for before, after in itertools.pairwise(schedule))


def test_the_ends_of_the_path_are_the_policies_themselves():
    reference, anchor = (0, 1, 3, 6, 10, 15, 21, 28), (0, 2, 20)
    assert interpolated_schedule(reference, anchor, 8, 40) == reference
    assert interpolated_schedule(reference, anchor, 3, 40) == anchor
    assert interpolated_schedule(reference, anchor, 2, 40) == schedule_from_policy(
        policy_from_schedule(anchor, 40), 2, 40
    )
    assert interpolated_schedule(reference, anchor, 40, 40) == tuple(range(40))


def test_above_the_reference_the_path_leads_to_the_full_schedule():
    reference, anchor = (0, 1, 3, 6, 10, 15, 21, 28), (0, 2, 20)
    distances = [
        wasserstein_distance(policy_from_schedule(interpolated_schedule(reference, anchor, b, 40), 40), full_policy())
        for b in (8, 12, 20, 40)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] == 0


@given(st.integers(2, 19), st.integers(20, 50), st.integers(1, 60), st.sampled_from(["reciprocal", "linear"]))
def test_weights_run_from_anchor_to_reference(anchor, reference, budget, law):
    weight = interpolation_weight(budget, reference, anchor, law)
    assert 0 <= weight <= 1
    assert interpolation_weight(anchor, reference, anchor, law) == pytest.approx(1)
    assert interpolation_weight(reference, reference, anchor, law) == pytest.approx(0)
    assert weight >= interpolation_weight(budget + 1, reference, anchor, law)


@given(st.floats(0, 1), st.integers(1, 9))
def test_candidate_weights_hold_the_default(default, count):
    weights = candidate_weights(default, count)
    assert round(default, 6) in weights and len(weights) <= count
    assert all(0 <= weight <= 1 for weight in weights) and list(weights) == sorted(weights)


@given(schedules(12), schedules(12))
@settings(max_examples=40, deadline=None)
def test_transport_plan_has_the_right_marginals_and_keeps_order(first, second):
    plan = transport_plan(first, second, 12)
    assert np.allclose(plan.sum(1), 1 / len(first)) and np.allclose(plan.sum(0), 1 / len(second))
    rows, columns = np.nonzero(plan > 1e-12)
    order = np.lexsort((columns, rows))
    assert np.all(np.diff(columns[order]) >= 0), "optimal transport on the line never crosses"


@pytest.mark.parametrize("schedule", [(), (1, 2), (0, 2, 2), (0, 5, 3), (0, 40)])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match="expected increasing steps from 0, all below 40"):
        policy_from_schedule(schedule, 40)
