"""The anchor search finds a planted optimum, is deterministic, and resumes to the same end."""

from __future__ import annotations

import math
import os
import random
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.schedules.anchor import gaps_from_schedule, schedule_from_gaps, search_anchor

PLANTED = (0, 3, 11, 30)


def score(schedule):
    return -float(sum(abs(a - b) for a, b in zip(schedule, PLANTED, strict=True)))


def search(trials=40, storage=None, scored=None, function=score):
    return search_anchor(
        lambda s: (scored.append(s) if scored is not None else None) or function(s),
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
