"""The resident loop on a device that is this host's memory: its results, its bindings, and what a
step costs the host.
"""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_device
import numpy as np
import pytest
import small_artifact as small

from otcache.runtime import HostError, Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.engines.choose import Selection
from otcache.runtime.loop import device_loop as resident_module
from otcache.runtime.loop.address_plan import plan_addresses
from otcache.runtime.loop.device_loop import as_type
from otcache.runtime.loop.timing import Timer

FLUX = Path(__file__).parents[2] / "golden" / "1.5" / "artifact"


def resident(folder, **options):
    backend = host_device.HostBackend(**options)
    return Sampler(Artifact.open(folder), Selection(backend, {})), backend


@pytest.fixture(scope="module")
def plain(artifact_folder):
    with Sampler.load(artifact_folder, "onnxruntime", threads=1) as sampler:
        yield sampler


def draw(sampler, budget, n, **options):
    texts = ["a red ring", "a blue star", "a"][:n]
    return sampler.sample(sampler.encode(texts), budget=budget, seed=3, guidance_scale=3.0, **options)


@pytest.mark.parametrize(
    ("cuda_graph", "granularity"), [(False, "block"), (True, "block"), (False, "trunk"), (True, "trunk")]
)
def test_latents_are_those_of_the_loop_on_the_host(artifact_folder, plain, cuda_graph, granularity):
    sampler, backend = resident(artifact_folder, cuda_graph=cuda_graph, granularity=granularity)
    for _ in range(3):  # the first time the arena grows, the second time all is recorded, the third time replayed
        before = backend.device.calls["replay"]
        for budget in sampler.budgets:
            for n in (3, 1, 2):
                found, expected = draw(sampler, budget, n), draw(plain, budget, n)
                np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert backend.device.calls["replay"] - before == (9 if cuda_graph else 0)
    assert ("block_0..block_1" in backend.engines) == (granularity == "trunk")
    sampler.close()
    assert not backend.device.memory, "everything is freed"


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_requests_cannot_fill_the_device(artifact_folder, plain, cuda_graph, monkeypatch):
    monkeypatch.setattr(resident_module, "MOST_PREPARED", 2)
    sampler, backend = resident(artifact_folder, cuda_graph=cuda_graph)
    held = []
    for _ in range(3):
        for budget, n in itertools.product(sampler.budgets, (3, 1, 2)):
            found, expected = draw(sampler, budget, n), draw(plain, budget, n)
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
            held.append(len(backend.device.memory))
    weights = min(held) - 2  # beside them the arena and one table
    assert max(held) <= weights + 3
    sampler.close()
    assert not backend.device.memory, "everything is freed"


def test_a_real_export(plain):
    """Blocks with two streams, of which a concatenation is one; at another size positions and all shapes are others."""
    with Sampler.load(FLUX, "onnxruntime", threads=1) as onnx:
        sampler, _ = resident(FLUX)
        for budget in sampler.budgets:
            for size in ({}, {"height": 24, "max_sequence_length": 4}):
                encoded = onnx.encode("a red ring", max_sequence_length=size.get("max_sequence_length"))
                expected = onnx.sample(encoded, budget=budget, seed=5, **size)
                found = sampler.sample(encoded, budget=budget, seed=5, **size)
                np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_guidance_that_keeps_the_norm(damaged):
    value = small.read_manifest(damaged)
    value["guidance"]["kind"] = "cfg_norm"
    small.write_manifest(damaged, value)
    sampler, _ = resident(damaged)
    with Sampler.load(damaged, "onnxruntime", threads=1) as onnx:
        np.testing.assert_allclose(draw(sampler, 3, 2), draw(onnx, 3, 2), rtol=1e-4, atol=1e-4)


def test_a_recorded_loop_gives_the_same_bits(artifact_folder, caplog):
    """Every budget and batch is recorded when it is first asked for, which is logged with the memory, and replayed from
    then on.
    """
    caplog.set_level("INFO", "otcache.runtime.loop.device_loop")
    sampler, backend = resident(artifact_folder, cuda_graph=True)
    draw(sampler, "full", 2)  # the largest arena: nothing has to be prepared twice
    for number, (budget, n) in enumerate([("full", 2), ("full", 1), ("2", 2), ("3", 1)], start=1):
        first = draw(sampler, budget, n)
        assert backend.device.calls["record"] == number
        np.testing.assert_array_equal(first, draw(sampler, budget, n))
        assert (
            backend.device.calls["record"] == number
            and f"budget {budget}, 4x4, 3 tokens, {n} at once: recorded" in caplog.text
        )
    assert "recorded 42 launches in 8 contexts" in caplog.text and "of workspace" in caplog.text


def test_requests_come_from_any_thread(artifact_folder, plain):
    sampler, _ = resident(artifact_folder)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(draw, sampler, 2, 1).result()
    np.testing.assert_allclose(found, draw(plain, 2, 1), atol=1e-5)


def counts(backend):
    total = Counter()
    for engine in backend.engines.values():
        total += engine.calls
    return total


def test_a_step_costs_the_host_the_same_every_time(artifact_folder):
    """Per step: a launch for each stage and combination, a few addresses, no copy, no wait unless somebody watches."""
    sampler, backend = resident(artifact_folder)
    seen = []

    def step_done(done, total):
        seen.append(counts(backend) + Counter({"upload": backend.device.calls["upload"]}))

    draw(sampler, "full", 2, progress=step_done)
    per_step = [after - before for before, after in itertools.pairwise(seen)]
    launches = len(sampler.manifest.trunk) + 3
    assert {step["enqueue"] for step in per_step} == {launches}
    assert all(step["set_shape"] == step["upload"] == 0 for step in per_step[1:]), (
        "update_2 runs from the second step on"
    )
    assert len({step["set_address"] for step in per_step[1:]}) == 1
    before = backend.device.calls.copy()
    draw(sampler, "full", 2)
    used = backend.device.calls - before
    brought = len(sampler.manifest.conditioning) + 2
    assert (used["upload"], used["download"], used["synchronize"]) == (brought, 1, 0)
    before = backend.device.calls.copy()
    draw(sampler, "full", 2, timer=Timer())
    assert (backend.device.calls - before)["synchronize"] == 6


def test_progress_cancels_between_steps(artifact_folder, plain):
    sampler, _ = resident(artifact_folder)

    def cancel(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(sampler, "full", 1, progress=cancel)
    np.testing.assert_allclose(draw(sampler, "full", 1), draw(plain, "full", 1), atol=1e-4)


def test_a_device_without_room_says_so_and_goes_on(artifact_folder, plain):
    sampler, _ = resident(artifact_folder, capacity_bytes=48 << 10)
    expected = draw(plain, 3, 1)
    np.testing.assert_allclose(draw(sampler, 3, 1), expected, atol=1e-4)
    many = sampler.encode(["a"] * 64)
    with pytest.raises(HostError, match="fewer pictures"):
        sampler.sample(many, budget=3)
    np.testing.assert_allclose(draw(sampler, 3, 1), expected, atol=1e-4)


def test_programs_are_planned_when_they_are_loaded(artifact_folder, monkeypatch):
    """Of the size and batch that most requests have, in one arena; others when they are first asked for."""
    planned = []

    def watched(manifest, program, samples):
        planned.append(samples)
        return plan_addresses(manifest, program, samples)

    monkeypatch.setattr(resident_module, "plan_addresses", watched)
    sampler, backend = resident(artifact_folder)
    assert planned == [1, 1, 1] and max(block.nbytes for block in backend.device.memory.values()) > 1000
    before = set(backend.device.memory)
    for budget in sampler.budgets:
        draw(sampler, budget, 1)
    assert planned == [1, 1, 1] and before <= set(backend.device.memory), "nothing is planned twice, no arena grows"
    draw(sampler, 2, 3)
    draw(sampler, 2, 3)
    assert planned == [1, 1, 1, 3]


def test_a_device_without_room_to_load_keeps_nothing(artifact_folder):
    backend = host_device.HostBackend(capacity_bytes=5000)
    with pytest.raises(HostError, match="no room"):
        Sampler(Artifact.open(artifact_folder), Selection(backend, {}))
    assert not backend.device.memory


def test_bfloat16_is_rounded_to_nearest():
    torch = pytest.importorskip("torch")
    values = np.concatenate([np.random.default_rng(0).standard_normal(4096), [0, -0.0, 1e-40, 1.00390625, 3.0e38]])
    expected = torch.tensor(values.astype(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(as_type(values, "bfloat16").view(np.uint16), expected)
