"""Peers that run inside the pipeline: every evaluation computed is the full run, budgets are kept, state is left
behind.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from otcache.compiler.compare import cache_dit, diffusers_caches, seacache
from otcache.compiler.compare.cache_dit import CALIBRATORS, mask_from_schedule, preset_schedules
from otcache.compiler.compare.compare import methods
from otcache.compiler.compare.method import NotApplicable
from otcache.compiler.compare.pipeline_method import (
    PipelineMethod,
    Setting,
    block_lists,
    count_evaluations,
    deep_layer,
    run_pipeline,
)
from otcache.compiler.compare.teacache import TeaCache

T = 8
INSIDE = [method for method in methods() if isinstance(method, PipelineMethod)]
WITHOUT_CACHE_DIT = importlib.util.find_spec("cache_dit") is None


def recorded(bench, rows, held_out=True):
    """Final latents of the full runs that were recorded."""
    samples = bench.evaluation if held_out else bench.calibration.samples
    return torch.from_numpy(samples.runs.latents(rows, -1))


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_every_step_computed_is_the_full_run(bench, method):
    if method.name.startswith("cache-dit") and WITHOUT_CACHE_DIT:
        pytest.skip("cache-dit is not installed")
    if method.name in ("dpm++2m", "unipc"):
        pytest.skip("another solver: its T steps end elsewhere")
    if method.name == "fastercache":
        with pytest.raises(NotApplicable, match="run at every step"):
            method.run(bench, T)
        return
    outcome = method.run(bench, T)
    assert outcome.nfe.tolist() == [T] * bench.count
    assert outcome.scores["latent_error"].max() < 1e-4


@pytest.mark.parametrize("method", INSIDE, ids=lambda method: method.name)
def test_budgets_are_kept_and_nothing_is_left_behind(bench, method):
    if method.name.startswith("cache-dit") and WITHOUT_CACHE_DIT:
        pytest.skip("cache-dit is not installed")
    outcome = method.run(bench, 4)
    assert outcome.nfe.shape == (bench.count,) and 1 <= outcome.nfe.mean() <= 4
    assert all(outcome.scores[name].shape == (bench.count,) for name in ("psnr_db", "ssim"))
    assert outcome.scores["latent_error"].min() > 1e-4
    after = run_pipeline(bench, [0], held_out=True)
    assert torch.allclose(after, recorded(bench, slice(1)), atol=1e-5)


def test_prompts_and_seeds_are_those_of_the_recorded_runs(bench):
    for held_out in (False, True):
        found = run_pipeline(bench, [1, 2], held_out=held_out)
        assert torch.allclose(found, recorded(bench, slice(1, 3), held_out), atol=1e-5)


def test_evaluations_are_counted_per_branch(bench):
    with count_evaluations(bench) as counter:
        run_pipeline(bench, [0], held_out=True)
    assert counter.evaluations == T


def test_teacache_skips_more_at_a_higher_threshold_and_agrees_with_itself(bench):
    def run(threshold):
        cache = TeaCache(bench.pipeline, np.array([0.0, 0.0, 0.0, 1.0, 0.0]), threshold, T, 2)
        with cache.installed(), count_evaluations(bench) as counter:
            first = run_pipeline(bench, [0], held_out=True)
            second = run_pipeline(bench, [0], held_out=True)
        assert torch.equal(first, second)
        return counter.evaluations / 2

    counts = [run(threshold) for threshold in (0.0, 0.3, 1e9)]
    assert counts[0] == T and counts[2] == 2 and counts[0] >= counts[1] >= counts[2]


def test_teacaches_skipped_step_adds_the_residual_of_the_last_computed_one(bench):
    """Against a direct computation: skip everything but the first and last step, from the pipeline's own blocks."""
    transformer = bench.pipeline.transformer
    blocks = [block for part in block_lists(transformer) for block in part]
    cache = TeaCache(bench.pipeline, np.array([1.0, 0.0]), 1e9, T, 2)
    inputs, outputs = [], []
    with cache.installed():
        wrapped_first, wrapped_last = blocks[0].forward, blocks[-1].forward

        def first(*args, **kwargs):
            inputs.append(kwargs["hidden_states"].clone())
            return wrapped_first(*args, **kwargs)

        def last(*args, **kwargs):
            result = wrapped_last(*args, **kwargs)
            outputs.append(result[1].clone())
            return result

        blocks[0].forward, blocks[-1].forward = first, last
        run_pipeline(bench, [0], held_out=True)
    assert len(inputs) == len(outputs) == 2 * T
    for branch in (0, 1):
        residual = outputs[branch] - inputs[branch]
        for step in range(1, T - 1):
            position = 2 * step + branch
            assert torch.allclose(outputs[position] - inputs[position], residual, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 2, 4, 8, 10, 16, 50])
def test_presets_have_exactly_the_budget(budget):
    found = preset_schedules(budget, 50)
    assert found
    for schedule in found.values():
        assert len(set(schedule)) == budget and schedule[0] == 0 and schedule[-1] < 50


@pytest.mark.skipif(WITHOUT_CACHE_DIT, reason="cache-dit is not installed")
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_cache_dit_computes_the_steps_of_its_mask(bench, calibrator):
    """The first block runs at every step, the others at those of the mask, in both branches."""
    schedule = (0, 1, 4, 6)
    common = {"total": T, "apart": True, "first": 1, "calibrator": calibrator}
    setting = Setting(text="", values={"mask": mask_from_schedule(schedule, T), **common})
    steps, clock = [], []
    with cache_dit._masked(bench.pipeline, setting), count_evaluations(bench) as counter:
        first, second, *others = [block for each in block_lists(bench.pipeline.transformer) for block in each]
        deep_layer(first).register_forward_hook(lambda *_: clock.append(len(clock)))
        deep_layer(others[0] if others else second).register_forward_hook(lambda *_: steps.append(clock[-1] // 2))
        run_pipeline(bench, [0], held_out=True)
    assert clock == list(range(2 * T)) and tuple(dict.fromkeys(steps)) == schedule
    assert counter.blocks > len(schedule)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_taylor_hook_computes_the_released_steps(bench, order):
    """FORA's and TaylorSeer's released loops: full steps in the warm-up, then whenever a counter is full."""
    for setting in diffusers_caches._intervals(order)(bench, 3):
        warmup, interval = [int(word) for word in setting.text.split() if word.isdigit()][::-1]
        released, counter = [], 0
        for step in range(T):
            full = step < warmup or counter == interval - 1
            counter = 0 if full else counter + 1
            released += [step] if full else []
        assert setting.values["schedule"] == released
        with diffusers_caches._taylor(bench.pipeline, setting), count_evaluations(bench) as counted:
            run_pipeline(bench, [0], held_out=True)
        assert counted.evaluations == len(released) == 3


def test_seacache_sees_every_step_and_the_frames(bench, monkeypatch):
    """Against fail-open: without the steps that are added to `cache_context` nothing would be skipped, silently."""
    from diffusers.hooks import sea_cache

    seen = []
    original = sea_cache._build_indicator

    def indicator(config, metadata):
        seen.append((metadata.step_index, metadata.sigma, [tuple(frame.shape) for frame in metadata.raw_vision]))
        return original(config, metadata)

    monkeypatch.setattr(sea_cache, "_build_indicator", indicator)
    values = {"order": 0, "power": 2.0, "height": bench.call.height, "width": bench.call.width}
    setting = Setting(text="", values=values, threshold=1e9)
    with seacache._seacache(bench.pipeline, setting), count_evaluations(bench) as counter:
        run_pipeline(bench, [0], held_out=True)
    sigmas = [float(sigma) for sigma in bench.pipeline.scheduler.sigmas[:T]]
    assert [entry[:2] for entry in seen] == [(step, sigmas[step]) for step in range(T) for _ in ("cond", "uncond")]
    ((channels, frames, height, width),) = seen[0][2]
    assert frames == 1 and channels * height * width == bench.evaluation.elements
    assert counter.evaluations == 2  # the first and the last
    assert "cache_context" not in vars(bench.pipeline.transformer)


def test_seacaches_filter_is_wieners_of_a_power_law():
    """At half noise an axis' gain is ½·S / (¼·S + ¼) of a signal's power S: 2 at rest, 1.6 at the finest."""
    indicator = seacache.sea_indicator((1, 8, 16), [0.5], 2.0)
    flat = torch.ones(1, 32, 1)
    board = torch.tensor([(-1.0) ** (row + column) for row in range(4) for column in range(8)]).reshape(1, 32, 1)
    passed = [float(indicator(each, 0).abs().mean()) for each in (flat, board)]
    assert indicator(flat, 0).shape == (1, 1, 4, 8, 1)
    assert passed[0] / passed[1] == pytest.approx((2.0 / 1.6) ** 2, rel=1e-4)  # both axes are at their finest
    with pytest.raises(NotApplicable, match="33 tokens are no grid"):
        indicator(torch.ones(1, 33, 1), 0)


def test_seacache_as_published_skips_by_the_modulated_input(bench):
    setting = next(each for each in seacache._settings(bench, 4) if "grid" in each.values)
    counts = []
    for threshold in (0.0, 1e9):
        at = replace(setting, threshold=threshold)
        with seacache._seacache(bench.pipeline, at), count_evaluations(bench) as counter:
            run_pipeline(bench, [0], held_out=True)
        counts.append(counter.evaluations)
    assert counts == [T, 2]


def test_a_refused_cache_is_not_applicable(bench):
    with (
        pytest.raises(NotApplicable, match="enable_cache refuses object"),
        diffusers_caches.diffusers_cache(bench.pipeline, object()),
    ):
        pass


def test_shares_of_two_thresholds_use_the_whole_budget(bench):
    method = next(each for each in INSIDE if each.name == "first block")
    (setting,) = method.settings(bench, 4)
    found = method._within(bench, 4, setting, method.thresholds)
    assert 0 <= found.share < 1 and (found.share == 0 or found.lower < found.threshold)
    mean = method._tune(bench, found, slice(bench.calibration.count))["nfe"]
    assert mean <= 4 + 1e-6
    used = [replace(found, lower=1.0, threshold=2.0, share=0.4).at_row(row).threshold for row in range(10)]
    assert used.count(1.0) == 4 and used.count(2.0) == 6


def test_what_a_threshold_came_to_is_kept(bench, monkeypatch):
    method = next(each for each in INSIDE if each.name == "first block")
    (setting,) = method.settings(bench, 4)
    found = method._within(bench, 4, setting, method.thresholds)
    monkeypatch.setattr(PipelineMethod, "_answer", lambda *_, **__: pytest.fail("a run that was made before"))
    assert method._within(bench, 4, setting, method.thresholds) == found
