"""The governor by simulation: a queue in front of servers, with arrivals that are chosen or that Hypothesis chooses."""

import math
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queue_simulation import BUDGETS, SERVICE_S, changes, poisson, ramp, share, simulate

from otcache.runtime import Governor, UsageError
from otcache.runtime.serving.governor import IDLE, MOST_FAILURES

SETTINGS = {"high": 6, "low": 0, "hold_s": 0.5, "raise_after_s": 4.0}
BURST = [0.05 * index for index in range(40)]

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
@given(events, st.sampled_from(BUDGETS), st.sampled_from(BUDGETS), st.sampled_from(BUDGETS))
def test_it_stays_in_its_range_and_below_what_is_wanted(history, lowest, wanted, minimum):
    governor = Governor(BUDGETS, lowest=lowest, **SETTINGS)
    for _, budget in play(governor, history):
        assert BUDGETS.index(budget) >= BUDGETS.index(lowest)
    assert BUDGETS.index(governor.budget(0.0, wanted)) <= BUDGETS.index(wanted)
    floor = min(BUDGETS.index(minimum), BUDGETS.index(wanted))
    assert BUDGETS.index(governor.budget(0.0, wanted, minimum)) >= floor


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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_the_full_budget_comes_back_when_the_load_is_gone(gaps):
    governor = Governor(BUDGETS, **SETTINGS)
    served = simulate(governor, accumulate(gaps))
    assert len(served) == len(gaps)
    end = served[-1].time_s + SERVICE_S["full"]
    assert governor.budget(end + 3 * IDLE * SETTINGS["raise_after_s"]) == "full"


@pytest.mark.parametrize("clients", [1, 2, 7])
def test_after_a_burst_steady_clients_get_what_they_had(clients):
    """As many as the queue bears: before the burst all were served at `full`, and so they are soon after it."""
    assert share(simulate(Governor(BUDGETS), clients=clients, until_s=300), ["full"]) == 1
    after = simulate(Governor(BUDGETS), BURST, clients=clients, from_s=10, until_s=600)
    assert "4" in {one.budget for one in after}
    assert all(one.budget == "full" for one in after if one.time_s > 180)


def test_a_burst_lowers_step_by_step():
    served = [one.budget for one in simulate(Governor(BUDGETS), BURST)]
    first = served[: served.index("4")]
    assert first[0] == "full" and first == sorted(first, key=BUDGETS.index, reverse=True) and len(first) <= 3


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_steady_load_is_borne_without_flapping(part, budget, scale, seed):
    """Half and nine tenths of what a budget bears, of models from fast to slow, once they have settled."""
    service_s = {name: scale * seconds for name, seconds in SERVICE_S.items()}
    arrivals = poisson(part / service_s[budget], 1500 * service_s[budget], seed)
    served = simulate(Governor(BUDGETS), arrivals, service_s=service_s)
    settled = served[len(served) // 2 :]
    minutes = (settled[-1].time_s - settled[0].time_s) / 60
    assert changes(settled) <= min(1.2 * minutes + 4, 0.15 * len(settled) + 4)
    assert share(settled, BUDGETS[max(0, BUDGETS.index(budget) - 1) :]) > 0.6  # it does not stick below
    assert sum(one.load for one in settled) / len(settled) < (25 if budget == "4" else 8)


@pytest.mark.parametrize("seed", range(3))
def test_it_follows_a_ramp_up_and_down(seed):
    """From a tenth of what `full` bears to nearly what 4 bears and back, in two hours."""
    end, least, most = 7200.0, 0.1 / SERVICE_S["full"], 0.9 / SERVICE_S["4"]
    arrivals = ramp(lambda time: least + (most - least) * min(time, end - time) / (end / 2), end, seed)
    served = simulate(Governor(BUDGETS), arrivals)
    assert share([one for one in served if one.time_s < 200], ["full"]) == 1
    assert share([one for one in served if abs(one.time_s - end / 2) < 300], ["4"]) > 0.9
    assert served[-1].budget in ("16", "full")
    assert changes(served) <= 1.2 * end / 60


def test_more_than_the_lowest_budget_bears_keeps_it():
    served = simulate(Governor(BUDGETS), poisson(1.5 / SERVICE_S["4"], 600))
    assert share(served[len(served) // 20 :], ["4"]) == 1


def test_what_fails_is_tried_ever_more_seldom():
    governor = Governor(BUDGETS, **SETTINGS)
    now, waits = 0.0, []
    for _ in range(6):
        for _ in range(SETTINGS["high"]):
            governor.arrived(now)
        assert governor.budget(now) == "16"
        lowered = now
        governor.left(now)
        while governor.budget(now) != "full":
            now += 0.1
            governor.left(now)
            governor.arrived(now)
        waits.append(now - lowered)
        for _ in range(SETTINGS["high"] - 1):
            governor.left(now)
        now += SETTINGS["hold_s"]
    expected = [SETTINGS["raise_after_s"] * 2 ** min(failures, MOST_FAILURES) for failures in range(1, 7)]
    assert waits == pytest.approx(expected, abs=0.2)


def test_a_request_has_a_floor_of_its_own():
    governor = Governor(BUDGETS, lowest="8", **SETTINGS)
    for _ in range(3 * SETTINGS["high"]):
        governor.arrived(0.0)
    for second in range(3):
        governor.budget(float(second))
        governor.left(float(second))
    assert governor.budget(3.0) == "8"
    assert governor.budget(3.0, "full", "16") == "16" and governor.budget(3.0, "full", "full") == "full"
    assert governor.budget(3.0, "16", "4") == "8" and governor.budget(3.0, "4") == "4"


def test_time_that_goes_back_is_no_time():
    governor = Governor(BUDGETS, **{**SETTINGS, "high": 2})
    for time in (10.0, 5.0, 5.0):
        governor.arrived(time)
    governor.left(5.0)
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
