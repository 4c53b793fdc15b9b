"""Where the time goes: nested marks with a clock turned by hand, then a real request."""

import threading

import pytest

from otcache.runtime import Sampler, Timer
from otcache.runtime.loop.timing import PARTS


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_every_moment_belongs_to_one_part():
    clock = Clock()
    timer = Timer(clock)
    clock.spend(8)
    timer.waited()
    with timer.part("encode"):
        clock.spend(1)
        with timer.part("wait"):
            clock.spend(2)
        with timer.part("encode", "text"):
            clock.spend(4)
    timer.begin_steps()
    for step in range(2):
        clock.spend(0.25)
        with timer.part("blocks", "block_0"):
            clock.spend(16)
        with pytest.raises(ZeroDivisionError), timer.part("head", "head"):
            clock.spend(0.5)
            raise ZeroDivisionError
        timer.end_step(3 * step, compute=True)
    found = timer.timing()
    assert found.total_s == 48.5 and found.latency_s == 38.5
    assert found.parts == {
        "wait": 10,
        "encode": 5,
        "embed": 0,
        "blocks": 32,
        "forecast": 0,
        "head": 1,
        "decode": 0,
        "overhead": 0.5,
    }
    assert found.stages == {"text": 4, "block_0": 32, "head": 1}
    assert [step.step_index for step in found.steps] == [0, 3]
    for step in found.steps:
        assert step.total_s == 16.75 and step.parts == {"blocks": 16, "head": 0.5, "overhead": 0.25}


@pytest.mark.parametrize("budget", [2, 3, "full"])
def test_a_request(artifact_folder, budget):
    with Sampler.load(artifact_folder, threads=1) as sampler:
        timer = Timer()
        sampler("a red ring", budget=budget, images_per_prompt=2, timer=timer)
        found, program = timer.timing(), sampler.manifest.program(budget).program
        stages = [stage.name for stage in sampler.manifest.stages]
        assert set(sampler.load_s) == {"tokenizers", *stages} and min(sampler.load_s.values()) > 0
    assert tuple(found.parts) == PARTS and set(found.stages) == set(stages)
    assert min(found.parts.values()) >= 0 and sum(found.parts.values()) == pytest.approx(found.total_s)
    assert found.stages["block_0"] + found.stages["block_1"] == pytest.approx(found.parts["blocks"])
    assert (found.parts["forecast"] > 0) == (program.payload == "residual")
    assert [(s.step_index, s.compute) for s in found.steps] == [(s.step_index, s.compute) for s in program.steps]
    for step in found.steps:
        assert sum(step.parts.values()) == pytest.approx(step.total_s) and min(step.parts.values()) >= 0
        assert ("block_0" in step.stages) == step.compute and {"embed", "head"} <= set(step.stages)
    assert sum(step.total_s for step in found.steps) < found.total_s
    value = found.as_json()
    assert value["steps"][0]["parts"].keys() >= {"embed", "head", "overhead"} and value["latency_s"] <= value["total_s"]


def test_waiting_for_others_is_no_latency(artifact_folder):
    """A request behind a held one waits; what `budget_for` learns from it leaves the wait out."""
    with Sampler.load(artifact_folder, threads=1) as sampler:
        reached, go = threading.Event(), threading.Event()

        def hold(done, total):
            reached.set()
            assert go.wait(30)

        holder = threading.Thread(target=sampler, args=("a",), kwargs={"budget": "full", "progress": hold})
        holder.start()
        assert reached.wait(30)
        timer = Timer()
        behind = threading.Thread(target=sampler, args=("a",), kwargs={"budget": 2, "timer": timer})
        behind.start()
        behind.join(0.5)
        assert behind.is_alive()
        go.set()
        for thread in (holder, behind):
            thread.join(30)
        found = timer.timing()
        assert found.parts["wait"] >= 0.4
        assert sampler.budget_for(latency_s=0.15) == "2"
