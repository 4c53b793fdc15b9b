"""The anchor search finds a planted optimum, is deterministic, gives up what drifts, and resumes to the same end."""

from __future__ import annotations

import math
import os
import random
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.calibration.fit import Stopped
from otcache.compiler.schedules.anchor import gaps_from_schedule, schedule_from_gaps, search_anchor

PLANTED = (0, 3, 11, 30)


def score(schedule):
    return -float(sum(abs(a - b) for a, b in zip(schedule, PLANTED, strict=True)))


def search(trials=40, storage=None, scored=None, function=score):
    return search_anchor(
        lambda s, stop: ((scored.append(s) if scored is not None else None) or function(s), ()),
        budget=4,
        num_inference_steps=50,
        starts=[(0, 12, 25, 38), (0, 4, 15, 28)],
        trials=trials,
        seed=3,
        storage=storage,
    )


@given(st.sets(st.integers(1, 49), max_size=49).map(lambda s: (0, *sorted(s))))
@settings(max_examples=200, deadline=None)
def test_every_schedule_can_be_expressed(schedule):
    gaps = [max(gap, 1e-9) for gap in gaps_from_schedule(schedule, 50)]
    assert schedule_from_gaps(gaps, 50) == schedule


def test_search_improves_on_its_starts_and_scores_no_schedule_twice():
    scored = []
    result = search(scored=scored)
    assert scored[:2] == [(0, 12, 25, 38), (0, 4, 15, 28)]
    assert len(scored) == len(set(scored)) == result.evaluated
    assert result.score > max(score((0, 12, 25, 38)), score((0, 4, 15, 28)))
    assert result.score == score(result.schedule)


def test_same_seed_same_result():
    assert search() == search()


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    count = [0]

    def failing(schedule):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return score(schedule)

    with pytest.raises(KeyboardInterrupt):
        search(trials=14, storage=storage, function=failing)
    scored = []
    resumed = search(trials=14, storage=storage, scored=scored)
    assert len(scored) == resumed.evaluated - 5
    assert resumed == search(trials=14)


def test_a_schedule_that_diverges_loses():
    result = search(trials=12, function=lambda s: math.nan if s == (0, 12, 25, 38) else score(s))
    assert result.schedule != (0, 12, 25, 38) and result.evaluated > 1


def test_a_search_without_any_finite_score_is_refused():
    with pytest.raises(ValueError, match="none of 2 schedules of 4 steps has a finite score"):
        search(trials=2, function=lambda s: math.nan)
    with pytest.raises(ValueError, match="trials is 0: expected 1 or more"):
        search(trials=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_search_killed_again_and_again_scores_every_schedule_once(tmp_path):
    """SIGKILL at random moments, those at which the database is created included; every run goes on where the last
    stopped.
    """
    storage, log, draw = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "scored", random.Random(3)

    def noted(schedule):
        value = score(schedule)
        with open(log, "a") as file:
            file.write(f"{schedule}\n")
        return value

    search(trials=1)  # imports
    kills = 0
    for attempt in range(60):
        pid = os.fork()
        if pid == 0:
            try:
                search(trials=20, storage=storage, function=noted)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.0, 0.6) * (1 + attempt / 10))  # longer and longer, for slow machines
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status == 0:
            break
        kills += 1
    scored = []
    result = search(trials=20, storage=storage, scored=scored)
    assert result == search(trials=20)
    lines = log.read_text().splitlines() if log.exists() else []
    assert kills >= 1
    assert len({*lines, *map(str, scored)}) == result.evaluated, "the trial under way at the last kill is scored again"
    assert len(lines) - len(set(lines)) <= kills, "at most the trial that was under way is scored again"


class Drifting:
    """Schedules whose drift grows with their distance from the planted one, step by step, as a walk reports it."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at
        self.walked: dict[tuple[int, ...], int] = {}
        """Steps of each schedule that were computed."""

    def drifts(self, schedule):
        """Before each step, and at the end."""
        return [float(d) for d in np.cumsum([0, *(abs(a - b) for a, b in zip(schedule, PLANTED, strict=True))])]

    def __call__(self, schedule, stop):
        assert schedule not in self.walked
        if len(self.walked) == self.fail_at:
            raise KeyboardInterrupt
        *before, last = self.drifts(schedule)
        for position, drift in enumerate(before):
            self.walked[schedule] = position + 1
            if stop(position, drift):
                raise Stopped(position)
        return score(schedule), [*before, last]


def drifting(function, trials=30, storage=None):
    return search_anchor(
        function,
        budget=4,
        num_inference_steps=50,
        starts=[(0, 12, 25, 38), (0, 4, 15, 28)],
        trials=trials,
        seed=3,
        storage=storage,
    )


def test_a_trial_that_drifts_further_than_the_best_ever_did_is_given_up():
    walks = Drifting()
    result = drifting(walks)
    assert result.pruned and result.score == score(result.schedule)
    best = -math.inf
    limit = math.inf
    """How far the best one so far ever drifted."""
    given_up = dict(result.pruned)
    for schedule, computed in walks.walked.items():
        before = walks.drifts(schedule)[:-1]
        beyond = next((position for position, drift in enumerate(before) if drift > limit), None)
        if beyond is None:
            assert schedule in result.schedules and computed == 4
            if score(schedule) > best:
                best, limit = score(schedule), max(walks.drifts(schedule))
        else:
            assert given_up[schedule] == computed == beyond + 1
    assert set(result.schedules) | set(given_up) == set(walks.walked) and result.evaluated == len(walks.walked)
    assert not set(result.schedules) & set(given_up)


def test_the_first_trial_is_never_given_up_and_others_without_drifts_neither():
    seen = []

    def without(schedule, stop):
        seen.append(stop(0, 1e9))
        return score(schedule), ()

    result = drifting(without, trials=6)
    assert not any(seen) and not result.pruned


@pytest.mark.parametrize("fail_at", [1, 2, 5, 9, 14])
def test_a_resumed_search_gives_up_what_an_undisturbed_one_does(fail_at, tmp_path):
    """So that both charge the same: schedules that were scored, and for the others the steps that were computed."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first, second = Drifting(fail_at), Drifting()
    with pytest.raises(KeyboardInterrupt):
        drifting(first, storage=storage)
    resumed = drifting(second, storage=storage)
    assert resumed == drifting(Drifting())
    assert resumed.pruned and not set(first.walked) & set(second.walked), "nothing is walked twice"
