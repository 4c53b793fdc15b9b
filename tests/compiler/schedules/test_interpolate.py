"""Laws of the weight, and schedules between reference and anchor against quantiles written out by hand.

Exact budgets and the ends of the path are tested with the policies, in `test_policy.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.schedules.interpolate import candidate_weights, interpolated_schedule, interpolation_weight

TOTAL = 40


@given(st.integers(1, 9), st.integers(10, 40), st.data())
def test_weights_are_affine_in_their_laws_variable(anchor, reference, data):
    budget = data.draw(st.integers(anchor, reference))
    linear = interpolation_weight(budget, reference, anchor, "linear")
    reciprocal = interpolation_weight(budget, reference, anchor)
    assert (1 - linear) * reference + linear * anchor == pytest.approx(budget)
    assert (1 - reciprocal) / reference + reciprocal / anchor == pytest.approx(1 / budget)
    assert reciprocal <= linear + 1e-12


@given(st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_schedules_of_equal_budgets_interpolate_step_by_step(factor, weight, seed):
    """With reference and anchor of the same budget B, step k of B lies between their steps k: no quantiles are
    needed.
    """
    random = np.random.default_rng(seed)
    budget = 4 * factor
    first, second = (
        (0, *sorted(random.choice(np.arange(1, TOTAL), budget - 1, replace=False).tolist())) for _ in range(2)
    )
    ideal = (1 - weight) * np.array(first) + weight * np.array(second)
    found = interpolated_schedule(first, second, budget, TOTAL, weight=weight)
    # The ideal steps are one apart at least, so rounding (by up to a half) keeps them apart; a collision can only come
    # from floating-point noise at a half, and its repair moves a step by less than one more.
    assert np.abs(np.array(found) - ideal).max() <= 1.0 + 1e-9


def test_the_default_weight_is_the_law_in_one_over_b():
    reference, anchor = (0, 1, 3, 6, 10, 15, 21, 28), (0, 2, 20)
    for budget in range(3, 9):
        weight = interpolation_weight(budget, 8, 3)
        by_hand = interpolated_schedule(reference, anchor, budget, TOTAL, weight=weight)
        assert interpolated_schedule(reference, anchor, budget, TOTAL) == by_hand


def test_above_the_reference_the_weight_has_no_say():
    reference, anchor = (0, 1, 3, 6), (0, 20)
    found = {interpolated_schedule(reference, anchor, 9, TOTAL, weight=weight) for weight in (None, 0.0, 0.5, 1.0)}
    assert len(found) == 1


def test_an_anchor_that_is_no_smaller_than_the_reference_leaves_the_ends():
    assert interpolation_weight(5, 5, 5) == 0.0
    assert interpolation_weight(4, 5, 5) == 1.0


@pytest.mark.parametrize("budget", [0, -1])
@pytest.mark.parametrize("law", ["reciprocal", "linear"])
def test_budgets_below_one_are_refused(budget, law):
    with pytest.raises(ValueError, match=f"budget is {budget}: expected 1 or more"):
        interpolation_weight(budget, 8, 3, law)


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_weights_off_the_path_are_refused(weight):
    with pytest.raises(ValueError, match=r"expected 0 \(the start\) … 1 \(the end\)"):
        interpolated_schedule((0, 1, 3), (0, 9), 2, TOTAL, weight=weight)


def test_candidate_weights_surround_the_default():
    assert candidate_weights(0.5, 5) == (0.1, 0.366667, 0.5, 0.633333, 0.9)
    assert candidate_weights(0.0, 3) == (0.0, 0.4)
    assert candidate_weights(0.3, 1) == (0.3,)
