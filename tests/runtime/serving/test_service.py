"""The queue in front of a real sampler: bits, order, limits, cancel, timeout, close. Time is turned by hand."""

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import pytest

from otcache.runtime import (
    BusyError,
    ClosedError,
    DeadlineError,
    Governor,
    HostError,
    RequestError,
    Sampler,
    Service,
    UsageError,
    http_status,
)

PROMPTS = ("a red ring", "a blue star", "zebra", "")
TIMEOUT_S = 30
"""No wait in these tests takes that long unless something hangs."""


class Held(Sampler):
    """The real sampler, but every step of a request waits for a permit."""

    def __init__(self, *arguments):
        self.permits = threading.Semaphore(0)
        self.at_step = threading.Semaphore(0)
        super().__init__(*arguments)

    def draw(self, request, *, progress, timer):
        def held(done, total):
            self.at_step.release()
            assert self.permits.acquire(timeout=TIMEOUT_S)
            progress(done, total)

        return super().draw(request, progress=held, timer=timer)

    def wait_for_step(self):
        assert self.at_step.acquire(timeout=TIMEOUT_S)

    def free(self):
        self.permits.release(10_000)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def held(artifact_folder):
    """A sampler that waits at each step, freed at the end so that nothing hangs."""
    sampler = Held.load(artifact_folder, threads=1)
    yield sampler
    sampler.free()
    sampler.close()


@pytest.fixture
def service(held, clock):
    with Service(held, capacity=2, clock=clock) as service:
        yield service
        held.free()


def requests(count=48):
    draw = random.Random(0)
    for _ in range(count):
        prompts = draw.sample(PROMPTS, draw.randint(1, 3))
        images = draw.randint(1, 3)
        seed = draw.choice([draw.randrange(1000), [draw.randrange(1000) for _ in range(images * len(prompts))]])
        yield {
            "prompt": prompts if draw.random() < 0.7 else prompts[0],
            "budget": draw.choice([2, "3", "full"]),
            "images_per_prompt": images,
            "seed": 3 if isinstance(seed, list) else seed,
            "guidance_scale": draw.choice([None, 2.0, 5.5]),
        } | ({"prompt": prompts, "seed": seed} if isinstance(seed, list) else {})


@pytest.mark.parametrize("samplers", [1, 2])
def test_concurrent_requests_get_the_bits_they_get_alone(artifact_folder, samplers):
    with Sampler.load(artifact_folder, threads=1) as sampler:
        alone = [(request, sampler(**request)) for request in requests()]
    assert len({images.tobytes() for _, images in alone}) > 40
    loaded = [Sampler.load(artifact_folder, threads=1) for _ in range(samplers)]
    with Service(*loaded, capacity=len(alone) * 4) as service:
        found = [None] * 4

        def client(number):
            order = random.Random(number).sample(alone, len(alone))
            found[number] = [(service.submit(**request), images) for request, images in order]

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        for request, images in (pair for pairs in found for pair in pairs):
            np.testing.assert_array_equal(request.result(TIMEOUT_S), images)
            assert request.budget == request.request.budget and request.timing.total_s > 0


def test_full_queue(service, held):
    running = service.submit("a", budget=2)
    held.wait_for_step()
    waiting = [service.submit("a", budget=2) for _ in range(2)]
    assert (service.waiting, service.running) == (2, 1)
    with pytest.raises(BusyError, match="queue is full: 2 requests wait: expected fewer than 2") as caught:
        service.submit("a", budget=2)
    assert caught.value.exit_code == HostError.exit_code == 6 and caught.value.retry_after_s >= 1
    assert http_status(caught.value) == 503
    held.free()
    assert all(request.result(TIMEOUT_S).shape == (1, 4, 4, 3) for request in (running, *waiting))
    assert service.submit("a", budget=2).result(TIMEOUT_S).shape == (1, 4, 4, 3)


def test_bad_requests_do_not_enter_the_queue(service, held):
    held.free()
    for options, words in (
        ({"budget": 5}, "expected one of 2, 3, full"),
        ({"images_per_prompt": 17}, "17 pictures: expected at most 16"),
        ({"images_per_prompt": 10**15}, "at most 16"),
        ({"images_per_prompt": 0}, "at least 1"),
        ({"prompt": 3}, "expected a string"),
        ({"seed": "x"}, "seed is"),
        ({"guidance_scale": 9}, "2 to 6"),
        ({"negative_prompt": ["a", "b"]}, "expected one, or 1"),
        ({"progress": print}, "progress is no option"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            service.submit(**{"prompt": "a", "budget": 2, **options})
        assert http_status(caught.value) == 400
    with pytest.raises(UsageError, match="timeout_s is 0"):
        service.submit("a", timeout_s=0)
    assert service.waiting == 0


def test_cancel_a_waiting_request(service, held):
    service.submit("a", budget=2)
    held.wait_for_step()
    first, second = (service.submit("a", budget=2, seed=seed) for seed in (1, 2))
    assert first.cancel() and first.cancelled() and first.cancel()
    assert service.waiting == 1
    assert wait([first], timeout=TIMEOUT_S).done == {first}
    with pytest.raises(CancelledError):
        first.result()
    service.submit("a", budget=2)  # its place is free again
    held.free()
    assert second.result(TIMEOUT_S).shape == (1, 4, 4, 3) and not second.cancel()


def test_cancel_the_running_request(service, held):
    running = service.submit("a", budget="full")
    held.wait_for_step()
    assert running.cancel() and not running.done()
    after = service.submit("a", budget=2, seed=4)
    held.permits.release()
    with pytest.raises(CancelledError):
        running.result(TIMEOUT_S)
    held.wait_for_step()  # the next request's first step: the cancelled one has made no other
    assert not held.at_step.acquire(blocking=False)
    held.free()
    assert after.result(TIMEOUT_S).shape == (1, 4, 4, 3)


def test_time_is_up(service, held, clock):
    running = service.submit("a", budget="full", timeout_s=10)
    held.wait_for_step()
    waiting = service.submit("a", budget=2, timeout_s=5)
    patient = service.submit("a", budget=2)
    clock.now += 6
    held.permits.release()
    with pytest.raises(DeadlineError, match="while it waited") as caught:
        waiting.result(TIMEOUT_S)
    assert caught.value.exit_code == 6 and http_status(caught.value) == 504
    held.wait_for_step()
    assert not running.done()
    clock.now += 6
    held.permits.release()
    with pytest.raises(DeadlineError, match="after 2 of 6 steps"):
        running.result(TIMEOUT_S)
    held.free()
    assert patient.result(TIMEOUT_S).shape == (1, 4, 4, 3)


def test_close_ends_everything(artifact_folder, clock):
    held = Held.load(artifact_folder, threads=1)
    service = Service(held, clock=clock)
    running = service.submit("a", budget="full")
    held.wait_for_step()
    waiting = [service.submit("a", budget=2) for _ in range(3)]
    closing = threading.Thread(target=service.close)
    closing.start()
    for request in waiting:  # ended before the running one is
        with pytest.raises(ClosedError, match="service is closed"):
            request.result(TIMEOUT_S)
    held.free()
    closing.join(TIMEOUT_S)
    with pytest.raises(ClosedError) as caught:
        running.result(TIMEOUT_S)
    assert http_status(caught.value) == 503
    with pytest.raises(ClosedError):
        service.submit("a", budget=2)
    with pytest.raises(RequestError, match="closed"):
        held.encode("a")
    service.close()
    assert not any(worker.is_alive() for worker in service._workers)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads and files in /proc")
def test_close_frees_threads_and_files(artifact_folder):
    def held():
        gc.collect()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def serve():
        with Service(Sampler.load(artifact_folder, threads=2), Sampler.load(artifact_folder, threads=2)) as service:
            for request in [service.submit("a", budget=3, seed=seed) for seed in range(4)]:
                request.result(TIMEOUT_S)
            return held()

    serve()
    before = held()
    during = serve()
    assert during[0] >= before[0] + 2
    assert held() == before


def test_failure_of_one_request_is_its_own(artifact_folder):
    class Failing(Sampler):
        def draw(self, request, **options):
            if request.texts[-1] == ("zebra",):
                raise HostError("no memory")
            return super().draw(request, **options)

    with Service(Failing.load(artifact_folder, threads=1)) as service:
        found = [service.submit(prompt, budget=2) for prompt in ("a", "zebra", "a")]
        with pytest.raises(HostError, match="no memory"):
            found[1].result(TIMEOUT_S)
        np.testing.assert_array_equal(found[0].result(TIMEOUT_S), found[2].result(TIMEOUT_S))


def test_degrading_service(artifact_folder, held, clock):
    governor = Governor(held.budgets, high=3, hold_s=1, raise_after_s=10)
    with Service(held, governor=governor, clock=clock) as service:
        found = [service.submit("a", seed=5)]
        held.wait_for_step()
        found += [
            service.submit("a", seed=5),
            service.submit("a", seed=5, minimum_budget=3),
            service.submit("a", budget=2, seed=5),
            service.submit("a", budget="full", seed=5),
            service.submit("a", budget="full", seed=5, minimum_budget=2),
        ]
        clock.now += 0.5
        held.free()
        budgets = [(request.result(TIMEOUT_S), request.budget)[1] for request in found]
        assert budgets == ["full", "3", "3", "2", "full", "3"] and governor.load == 0
        with Sampler.load(artifact_folder, threads=1) as alone:
            np.testing.assert_array_equal(found[1].result(), alone("a", budget=3, seed=5))
        clock.now += 80  # idle for 4 times raise_after_s, for each of two budgets
        last = service.submit("a", seed=5)
        np.testing.assert_array_equal(last.result(TIMEOUT_S), found[0].result())
        assert last.budget == "full"
        for end in (lambda: service.submit("a").cancel(), lambda: service.submit("a").result(TIMEOUT_S)):
            end()
    assert governor.load == 0


def test_awaiting_and_cancelling_from_asyncio(service, held):
    async def main():
        running = service.submit("a", budget="full")

        async def client():
            return await asyncio.wrap_future(running)

        task = asyncio.create_task(client())
        await asyncio.to_thread(held.wait_for_step)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.free()
        assert isinstance(await asyncio.to_thread(running.exception, TIMEOUT_S), CancelledError)
        assert (await asyncio.wrap_future(service.submit("a", budget=2))).shape == (1, 4, 4, 3)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 3, "minimum_budget": "full"}, "minimum_budget is 'full': expected one of 2, 3: at most the budget"),
        ({"minimum_budget": 5}, "minimum_budget is 5: expected one of 2, 3, full"),
        ({"budget": "full", "minimum_budget": True}, "minimum_budget is True"),
    ],
)
def test_floors_that_are_refused(service, held, options, words):
    held.free()
    with pytest.raises(RequestError, match=words):
        service.submit("a", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": True}, "capacity is True"),
        ({"max_images": 1.5}, "max_images is 1.5"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"governor": Governor(("4", "full"))}, "expected the artifact's"),
    ],
)
def test_settings_that_are_refused(held, options, words):
    before = threading.active_count()
    with pytest.raises(UsageError, match=words):
        Service(held, **options)
    with pytest.raises(UsageError, match="received 0 samplers"):
        Service()
    assert threading.active_count() == before


FORGOTTEN = """
import sys
from otcache.runtime import Sampler, Service
service = Service(Sampler.load(sys.argv[1]))
requests = [service.submit("a", budget="full", images_per_prompt=16) for _ in range(10)]
"""


def test_a_service_that_nobody_closes_does_not_hold_the_process(artifact_folder):
    done = subprocess.run(
        [sys.executable, "-c", FORGOTTEN, str(artifact_folder)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0 and not done.stderr


def test_status_of_other_errors():
    assert http_status(HostError("x")) == http_status(ZeroDivisionError()) == 500
