"""Requests that are drawn in one run: the pictures that they get alone, up to rounding, and nobody pays for another."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from otcache.runtime import DeadlineError, HostError, RequestError, Sampler, Service, UsageError

TIMEOUT_S = 30


class Watched(Sampler):
    """The real sampler; its first run begins when it is let, and it notes how many pictures each run is for."""

    def __init__(self, *arguments):
        self.runs, self.begins, self.at_step, self.fails = [], threading.Event(), None, False
        super().__init__(*arguments)

    def draw(self, request, *, progress, timer):
        self.runs.append(request.samples)
        assert self.begins.wait(TIMEOUT_S)
        if self.fails and request.samples > 1:
            raise HostError("no memory")

        def step(done, total):
            if self.at_step and request.samples > 1:
                self.at_step(done)
            progress(done, total)

        return super().draw(request, progress=step, timer=timer)


@pytest.fixture
def sampler(artifact_folder):
    with Watched.load(artifact_folder, threads=1) as sampler:
        yield sampler
        sampler.begins.set()


def submit_behind(service, sampler, requests):
    """Futures of requests that all wait while another one runs, until `sampler.begins` is set."""
    service.submit("a", budget=2)
    while not sampler.runs:
        time.sleep(0.001)
    return [service.submit(**request) for request in requests]


REQUESTS = [
    {"prompt": "a red ring", "budget": "3", "seed": 5},
    {"prompt": ["a blue star", "a"], "budget": "3", "images_per_prompt": 2, "seed": 6},
    {"prompt": "a red ring", "budget": "2", "seed": 7},
    {"prompt": "a red ring", "budget": "3", "seed": 8, "guidance_scale": 2.5},
    {"prompt": "a", "budget": "3", "seed": [9, 10], "images_per_prompt": 2},
    {"prompt": "a blue ring", "budget": "3", "seed": 11},
]


def test_requests_of_one_kind_join_and_get_their_own_pictures(sampler, artifact_folder):
    with Sampler.load(artifact_folder, threads=1) as alone:
        expected = [alone(**request) for request in REQUESTS]
    with Service(sampler, max_batch=8) as service:
        futures = submit_behind(service, sampler, REQUESTS)
        sampler.begins.set()
        for future, picture in zip(futures, expected, strict=True):
            np.testing.assert_allclose(future.result(TIMEOUT_S), picture, atol=1e-5)
            assert future.timing.parts["wait"] > 0
            assert sum(future.timing.parts.values()) == pytest.approx(future.timing.total_s)
        assert sampler.runs == [1, 8, 1, 1], "another budget and another scale run alone"


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_join_than_may(sampler, most):
    with Service(sampler, max_batch=most) as service:
        requests = [{"prompt": "a", "budget": "2", "seed": seed} for seed in range(4)]
        futures = submit_behind(service, sampler, requests)
        sampler.begins.set()
        for future in futures:
            future.result(TIMEOUT_S)
        assert sampler.runs == ([1] * 5 if most == 1 else [1, 2, 2])


def test_one_that_is_cancelled_or_late_leaves_the_others(sampler):
    now = 0.0

    def leave(done):
        nonlocal now
        if done == 1:
            futures[2].cancel()
            now = 10.5
        if done == 2:
            assert futures[0].done() and futures[2].done() and not futures[1].done()

    sampler.at_step = leave
    with Service(sampler, max_batch=8, clock=lambda: now) as service:
        requests = [{"prompt": "a", "budget": "full", "seed": seed, "timeout_s": 10 + seed} for seed in range(3)]
        futures = submit_behind(service, sampler, requests)
        sampler.begins.set()
        assert futures[1].result(TIMEOUT_S).shape[0] == 1
        with pytest.raises(DeadlineError, match="after 1 of 6 steps"):
            futures[0].result(TIMEOUT_S)
        with pytest.raises(CancelledError):
            futures[2].result(TIMEOUT_S)
        assert sampler.runs == [1, 3]


def test_a_batch_that_fails_is_drawn_one_by_one(sampler):
    sampler.fails = True
    with Service(sampler, max_batch=8) as service:
        futures = submit_behind(service, sampler, [{"prompt": "a", "budget": "2", "seed": seed} for seed in range(3)])
        sampler.begins.set()
        assert [future.result(TIMEOUT_S).shape[0] for future in futures] == [1, 1, 1]
        assert sampler.runs == [1, 3, 1, 1, 1]


def test_a_number_that_is_none(sampler):
    with pytest.raises(UsageError, match="max_batch is 0: expected a whole number of at least 1"):
        Service(sampler, max_batch=0)


def test_a_request_waits_for_others_until_a_run_is_full(sampler):
    """With real time: had it not waited, it would have run alone, and had a full run waited, this would take long."""
    sampler.begins.set()
    with Service(sampler, max_batch=3, max_wait_s=600) as service:
        futures = [service.submit("a", budget="3", seed=seed) for seed in range(3)]
        for future in futures:
            future.result(TIMEOUT_S)
        assert sampler.runs == [3]
        leaves = service.submit("a", budget="3")
        assert leaves.cancel() and leaves.cancelled() and not service.waiting


def test_a_request_that_nobody_joins_runs_when_its_wait_is_over(sampler):
    sampler.begins.set()
    with Service(sampler, max_batch=8, max_wait_s=0.05) as service:
        assert service.submit("a", budget="3").result(TIMEOUT_S).shape[0] == 1
    assert sampler.runs == [1]


def test_requests_of_one_call_are_all_there_before_the_first_runs(sampler):
    sampler.begins.set()
    with Service(sampler, max_batch=8) as service:
        asked = [{"prompt": "a", "budget": budget, "seed": seed} for seed in range(3) for budget in ("3", "2", "9")]
        found = service.submit_all(asked)
        errors = [each for each in found if isinstance(each, RequestError)]
        assert found[2::3] == errors and "budget is '9': expected one of 2, 3, full" in str(errors[0])
        for future in (each for each in found if each not in errors):
            future.result(TIMEOUT_S)
    assert sampler.runs == [3, 3]


def test_a_wait_that_is_none(sampler):
    with pytest.raises(UsageError, match="max_wait_s is -1: expected seconds, at least 0"):
        Service(sampler, max_wait_s=-1)
