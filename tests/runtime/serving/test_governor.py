"""The governor by simulation: a queue in front of one server, with arrivals that Hypothesis chooses."""

import math
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.runtime import Governor, UsageError

BUDGETS = ("4", "8", "16", "full")
SERVICE_S = {"4": 0.1, "8": 0.2, "16": 0.4, "full": 1.2}
SETTINGS = {"high": 6, "low": 1, "hold_s": 0.5, "raise_after_s": 4.0}

events = st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=120)
"""Seconds since the one before, and whether a request arrives (else one leaves, if there is one)."""


def play(governor, history):
    """Feed the events; the budget after each of them, with its time."""
    now, found = 0.0, []
    for wait, arrives in history:
        now += wait
        if arrives:
            governor.arrived(now)
        elif governor.load:
            governor.left(now)
        found.append((now, governor.budget(now)))
    return found


def serve(governor, gaps, quiet_s=100.0):
    """Simulate one server: requests come `gaps` apart, each takes what its budget takes; (time, budget) of each start."""
    arrivals, started, waiting, now = deque(), [], 0, 0.0
    for gap in gaps:
        now += gap
        arrivals.append(now)
    free = 0.0
    while arrivals or waiting:
        if waiting and (not arrivals or free <= arrivals[0]):
            budget = governor.budget(free)
            started.append((free, budget, governor.load))
            free += SERVICE_S[budget]
            while arrivals and arrivals[0] <= free:
                governor.arrived(arrivals.popleft())
                waiting += 1
            governor.left(free)
            waiting -= 1
        else:
            time = arrivals.popleft()
            governor.arrived(time)
            waiting += 1
            free = max(free, time)
    return started, governor.budget(free + quiet_s)


@settings(max_examples=200, deadline=None)
@given(events)
def test_same_history_same_budgets_however_often_it_is_asked(history):
    first, second = Governor(BUDGETS, **SETTINGS), Governor(BUDGETS, **SETTINGS)
    found = play(first, history)
    assert found == play(Governor(BUDGETS, **SETTINGS), history)
    now = 0.0
    for index, (wait, arrives) in enumerate(history):
        for part in (0.25, 0.5, 0.75):
            second.budget(now + part * wait)
        now += wait
        if arrives:
            second.arrived(now)
        elif second.load:
            second.left(now)
        if index % 3 == 0:
            assert second.budget(now) == found[index][1]
    assert not history or second.budget(now) == found[-1][1]


@settings(max_examples=200, deadline=None)
@given(events, st.sampled_from(BUDGETS), st.sampled_from(BUDGETS))
def test_it_stays_in_its_range_and_below_what_is_wanted(history, lowest, wanted):
    governor = Governor(BUDGETS, lowest=lowest, **SETTINGS)
    for _, budget in play(governor, history):
        assert BUDGETS.index(budget) >= BUDGETS.index(lowest)
    assert BUDGETS.index(governor.budget(0.0, wanted)) <= BUDGETS.index(wanted)


@settings(max_examples=200, deadline=None)
@given(events)
def test_it_changes_seldom_and_by_one(history):
    governor = Governor(BUDGETS, **SETTINGS)
    now, levels = 0.0, [(-math.inf, 3)]
    for wait, arrives in history:
        for _ in range(12):  # look often enough to see every change
            now += wait / 12
            level = BUDGETS.index(governor.budget(now))
            if level != levels[-1][1]:
                levels.append((now, level))
        if arrives:
            governor.arrived(now)
        elif governor.load:
            governor.left(now)
    seen = 3 / 12
    for (before, old), (after, new) in pairwise(levels):
        assert abs(new - old) == 1
        assert after - before >= (SETTINGS["raise_after_s"] if new > old else SETTINGS["hold_s"]) - seen


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_the_full_budget_comes_back_when_the_load_is_gone(gaps):
    started, after = serve(Governor(BUDGETS, **SETTINGS), gaps)
    assert len(started) == len(gaps) and after == "full"


def test_a_burst_lowers_the_budget_and_calm_raises_it_again():
    started, after = serve(Governor(BUDGETS, **SETTINGS), [0.05] * 100 + [3.0] * 20)
    served = [budget for _, budget, _ in started]
    assert served[0] == "full" and set(served) == set(BUDGETS) and after == "full"
    lowest = served.index("4")
    assert served[:lowest] == sorted(served[:lowest], key=BUDGETS.index, reverse=True)
    assert served[100:] == sorted(served[100:], key=BUDGETS.index) and served[-1] == "full"


@pytest.mark.parametrize("gap", [2.0, 1.3])
def test_a_load_that_the_full_budget_bears_changes_nothing(gap):
    started, _ = serve(Governor(BUDGETS, **SETTINGS), [gap] * 300)
    assert {budget for _, budget, _ in started} == {"full"}


@pytest.mark.parametrize("gap", [0.15, 0.25, 0.5, 0.8])
def test_a_steady_load_is_borne_without_flapping(gap):
    """Too much for the full budget, not for the lowest one: the queue stays short, the budget turns seldom."""
    count = 2000
    started, _ = serve(Governor(BUDGETS, **SETTINGS), [gap] * count)
    levels = [BUDGETS.index(budget) for _, budget, _ in started]
    turns, direction = 0, 0
    for old, new in pairwise(levels):
        if new != old:
            turns += direction not in (0, new - old)
            direction = new - old
    assert turns <= 2 * count * gap / SETTINGS["raise_after_s"]
    assert max(load for _, _, load in started) <= 3 * SETTINGS["high"]


def test_between_the_marks_nothing_changes():
    governor = Governor(BUDGETS, **SETTINGS)
    for _ in range(SETTINGS["high"]):
        governor.arrived(0.0)
    assert governor.budget(0.0) == "16"
    governor.left(0.1)
    assert governor.budget(1e6) == "16"
    for _ in range(3):
        governor.left(1e6)
    assert governor.budget(2e6) == "16"
    governor.left(2e6)
    assert governor.budget(2e6 + 3.9) == "16" and governor.budget(2e6 + 4.0) == "full"


def test_time_that_goes_back_is_no_time():
    governor = Governor(BUDGETS, **{**SETTINGS, "high": 2})
    governor.arrived(10.0)
    governor.arrived(5.0)
    assert governor.budget(10.0) == "16" and governor.budget(0.0) == "16" and governor.budget(10.5) == "8"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budgets": ()}, "at least one"),
        ({"budgets": ("4", "4")}, "none twice"),
        ({"lowest": "5"}, "expected one of 4, 8, 16, full"),
        ({"low": 8}, "low below high"),
        ({"low": -1}, "0 or more"),
        ({"hold_s": 0}, "more than 0 s"),
        ({"hold_s": 11}, "at most raise_after_s"),
        ({"raise_after_s": math.inf}, "raise_after_s"),
    ],
)
def test_settings_that_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Governor(**{"budgets": BUDGETS, **arguments})


def test_a_request_leaves_only_once():
    with pytest.raises(UsageError, match="arrived before"):
        Governor(BUDGETS).left(0.0)
