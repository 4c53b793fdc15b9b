"""Peers that are programs, against independent computations of what their papers say."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.calibration.scoring import scores_of
from otcache.compiler.compare import budcache, graph_taylor, lemica, meancache, residual_forecasts, solvers, spectrum
from otcache.compiler.compare.candidates import candidate_schedules
from otcache.compiler.pipelines.denoiser import Denoiser
from otcache.compiler.programs.baselines import baseline_programs, few_step_program, uniform_reuse_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import residual_program
from otcache.compiler.programs.solver_table import program_from_table
from otcache.compiler.schedules.gram import statistics_from_grams
from otcache.compiler.schedules.payloads import squared_errors_of
from otcache.schemas.program import Program

T = 12


@pytest.fixture(scope="module")
def table():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    return lower(scheduler)


@pytest.fixture(scope="module")
def trajectory(table):
    """A full Euler run of smooth made-up outputs: latents (T+1, n, d), outputs (T, n, d), float64."""
    random = np.random.default_rng(0)
    basis = random.standard_normal((4, 3, 5))
    outputs = np.stack([sum(np.cos((k + 1) * s / T) * basis[k] for k in range(4)) for s in range(T)])
    latents = [random.standard_normal((3, 5))]
    for step in range(T):
        latents.append(latents[-1] + (table.sigmas[step + 1] - table.sigmas[step]) * outputs[step])
    return np.stack(latents), outputs


def run(program, latents, outputs):
    """Execute an output program whose model gives the recorded outputs whatever the latents are."""
    kept, x = [], latents[0]
    for step in program.steps:
        kept.append(outputs[step.step_index])
        used = kept[len(kept) - len(step.output_coefs) :]
        x = step.latent_coef * x + sum(c * v for c, v in zip(step.output_coefs, used, strict=True))
    return x


# --- Spectrum
# ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 39), min_size=1, max_size=12), st.integers(0, 49))
def test_chebyshev_coefs_are_the_ridge_forecast(steps, target):
    computed = sorted(steps)
    features = np.random.default_rng(len(computed)).standard_normal((len(computed), 7))

    def row(step):
        tau = 2 * step / 50 - 1
        return np.array([np.cos(degree * np.arccos(tau)) for degree in range(5)])

    design = np.stack([row(step) for step in computed])
    # Ridge as plain least squares on rows augmented with sqrt(λ)·I: another way to the same minimum.
    augmented = np.concatenate([design, np.sqrt(0.1) * np.eye(5)])
    weights = np.linalg.lstsq(augmented, np.concatenate([features, np.zeros((5, 7))]), rcond=None)[0]
    found = spectrum.chebyshev_coefs(computed, target) @ features
    np.testing.assert_allclose(found, row(target) @ weights, atol=1e-8)


def test_spectrum_schedule_is_the_released_one():
    # 50 steps, window 2 growing by 0.75 after 5 warm-up steps, traced by hand through the released loop.
    expected, cached, window = [0, 1, 2, 3, 4], 0, 2.0
    for step in range(5, 50):
        if (cached + 1) % int(window) == 0:
            expected.append(step)
            window, cached = round(window + 0.75, 3), 0
        else:
            cached += 1
    assert spectrum.spectrum_schedule(5, 2.0, 0.75, 50) == tuple(expected)
    assert spectrum.spectrum_schedule(3, 1.0, 0.0, 10) == tuple(range(10))
    assert spectrum.spectrum_schedule(5, 2.0, 3.0, 50) == (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)  # the authors' at 10


@pytest.mark.parametrize("budget", [4, 8, 10, 16])
def test_the_released_schedules_of_spectrum_are_candidates(budget):
    found = spectrum.candidate_spectrum_schedules(budget, 50)
    assert all(len(schedule) == budget for schedule in found)
    if budget == 10:
        assert (0, 1, 2, 3, 4, 6, 11, 19, 30, 44) in found


@pytest.mark.parametrize("blend", [0.5, 0.8])
def test_spectrums_blend_is_that_of_a_straight_line_and_the_spectral_forecast(blend):
    computed, step = [0, 1, 2, 3, 4, 6, 11], 15
    values = np.random.default_rng(0).standard_normal((7, 3))
    line = values[-1] + (step - 11) / (11 - 6) * (values[-1] - values[-2])
    spectral = spectrum.chebyshev_coefs(computed, step) @ values
    found = spectrum.blended_coefs(computed, step, blend) @ values
    np.testing.assert_allclose(found, (1 - blend) * line + blend * spectral)


# --- MeanCache
# -----------------------------------------------------------------------------------------------------------


def released_meancache(sigmas, schedule, orders, x, outputs):
    """The released loop: logs of latents, sigmas and velocities, the derivative from `orders` steps back."""
    before, velocities = [], []
    edges = dict(zip(schedule, [*schedule[1:], len(outputs)], strict=True))
    start = 0
    for step in range(len(outputs)):
        before.append(x)
        if step in schedule:
            velocity, start = outputs[step], step
        else:
            order = orders[start, edges[start]]
            first = max(0, len(velocities) - order)
            span = sigmas[step] - sigmas[first]
            derivative = (velocities[first] - (x - before[first]) / span) / span
            velocity = velocities[-1] - derivative * (sigmas[step + 1] - sigmas[step])
        velocities.append(velocity)
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
    return x


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, T - 1), max_size=6), st.integers(0, 2**31))
def test_meancache_program_is_the_released_loop(steps, seed):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    solver = lower(scheduler)
    random = np.random.default_rng(seed)
    schedule = (0, *sorted(steps))
    orders = random.integers(1, 7, size=(T, T + 1))
    outputs, x = random.standard_normal((T, 4)), random.standard_normal(4)
    found = run(meancache.meancache_program(solver, schedule, orders), x[None], outputs)
    expected = released_meancache(solver.sigmas, schedule, orders, x, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def missed_displacement(table, outputs, start, end, order):
    """What an edge's forecast misses, step by step along a full run: (n, d)."""
    moves = np.diff(table.sigmas)
    rows = meancache.mean_velocity_coefs(table.sigmas, start, end, order, np.eye(start + 1, T))
    return np.tensordot(moves[start:end] @ (rows[start:end] - np.eye(T)[start:end]), outputs, axes=1)


@pytest.mark.parametrize("cap", meancache.CAPS)
def test_meancaches_edges_are_the_errors_of_its_forecast(table, trajectory, cap):
    latents, outputs = trajectory
    vectors = np.concatenate([latents, outputs]).swapaxes(0, 1)  # (n, 2T + 1, d)
    statistics = statistics_from_grams(vectors @ vectors.swapaxes(1, 2), elements=vectors.shape[2])
    errors, orders = meancache.cheapest_orders(meancache.displacement_costs(table, statistics), cap)
    for start, end in itertools.combinations(range(T + 1), 2):
        allowed = meancache.orders_at(start, cap)
        missed = [missed_displacement(table, outputs, start, end, order) for order in allowed]
        costs = [np.mean(each**2) for each in missed]
        assert errors[start, end] == pytest.approx(min(costs), rel=1e-6, abs=1e-12)
        assert costs[allowed.index(orders[start, end])] == pytest.approx(min(costs), rel=1e-6, abs=1e-12)
    assert np.allclose(np.diagonal(errors, offset=1), 0.0)


def test_meancaches_published_cost_is_the_error_of_the_average_velocity(bench):
    """From the latents of the recorded runs alone: outputs of an Euler flow are their differences."""
    samples, sigmas = bench.calibration.samples, bench.table.sigmas
    total = bench.table.num_inference_steps
    found = samples.map(meancache.average_velocity_errors(bench.table), slice(2))["errors"]
    latents = np.stack([samples.runs.latents(slice(2), i).reshape(2, -1) for i in range(total + 1)])
    start, end, velocities = 2, 5, np.diff(latents, axis=0) / np.diff(sigmas)[:, None, None]
    true = (latents[end] - latents[start]) / (sigmas[end] - sigmas[start])
    held = np.abs(true - velocities[start]).mean(axis=1)  # order 1 reuses the last velocity
    np.testing.assert_allclose(found[:, 0, start, end], held, rtol=1e-4)


def test_meancache_with_every_step_is_the_full_run(table, trajectory):
    latents, outputs = trajectory
    program = meancache.meancache_program(table, tuple(range(T)), np.ones((T, T + 1), dtype=int))
    np.testing.assert_allclose(run(program, latents, outputs), latents[-1], atol=1e-6)
    assert program.nfe == T


def test_order_one_is_plain_reuse(table):
    rows = meancache.mean_velocity_coefs(table.sigmas, 3, 7, 1, np.eye(4, T))
    np.testing.assert_array_equal(rows[4:], np.repeat(rows[3:4], 3, axis=0))


# --- annealing
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 9, 10])
def test_annealing_finds_the_best_schedule_of_a_small_problem(budget):
    random = np.random.default_rng(budget)
    values = random.random(10)

    def loss(schedule):
        assert len(schedule) == budget and list(schedule) == sorted(set(schedule)) and schedule[0] == 0
        return -float(values[list(schedule)].sum())

    prefix = max(1, budget // 4)
    best = min(
        (loss((*range(prefix), *rest)) for rest in itertools.combinations(range(prefix, 10), budget - prefix)),
    )
    found, scored = budcache.annealed_schedule(loss, budget, 10, iterations=200, rounds=20, seed=0)
    assert loss(found) == pytest.approx(best) and scored >= 1
    assert (found, scored) == budcache.annealed_schedule(loss, budget, 10, iterations=200, rounds=20, seed=0)


def test_spectrum_program_with_every_step_is_the_full_run(table):
    program = spectrum.spectrum_program(table, tuple(range(T)))
    assert program == program_from_table(table, payload="residual")


# --- LeMiCa
# --------------------------------------------------------------------------------------------------------------


def test_jump_errors_are_those_of_one_replay_for_each_edge(bench):
    total = bench.table.num_inference_steps

    def replay(start, end):
        schedule = [index for index in range(total) if not start < index < end]
        steps = residual_program(bench.table, schedule, "reuse", np.zeros((total, total))).steps[start:]
        answer = squared_errors_of(Program(payload="residual", steps=steps), start)
        return bench.calibration.samples.map(answer, slice(2))["squared_error"]

    for start in range(total):
        found = bench.calibration.samples.map(lemica.jump_errors(bench.table, start), slice(2))
        assert found["l2"].shape == found["l1"].shape == (2, max(0, total - start - 1))
        assert (found["l1"] <= np.sqrt(found["l2"]) * (1 + 1e-9)).all()
        for end in range(start + 2, total + 1):
            np.testing.assert_allclose(found["l2"][:, end - start - 2], replay(start, end), rtol=1e-3, atol=1e-9)


def test_evaluations_of_jumps_are_counted(bench, monkeypatch):
    made, evaluate, start = [1], Denoiser.__call__, 2  # one is the jump's own: its blocks run apart

    def count(self, latents, *args):
        made[0] += latents.shape[0]
        return evaluate(self, latents, *args)

    monkeypatch.setattr(Denoiser, "__call__", count)
    bench.calibration.samples.map(lemica.jump_errors(bench.table, start), slice(1))
    assert made[0] == lemica.jump_evaluations(start, bench.table.num_inference_steps) > 1


# --- forecasts of residuals
# ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed")
@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(2, 29), max_size=6), st.integers(1, 2))
def test_taylorseers_forecast_is_that_of_a_library(steps, order):
    """cache-dit's calibrator is fed the computed values, and asked for those between them."""
    from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState

    computed = [0, 1, *sorted(steps)]  # the library takes no difference before its step 2
    values = torch.from_numpy(np.random.default_rng(len(steps)).standard_normal((30, 3)))
    state, seen = TaylorSeerState(n_derivatives=order), []
    for step in range(30):
        state.mark_step_begin()
        if step in computed:
            state.update(values[step])
            seen.append(step)
        elif len(seen) > order + 2:
            weights = residual_forecasts.taylorseer_coefs(seen, step, order)
            kept = values[seen[-len(weights) :]]
            torch.testing.assert_close(state.approximate(), torch.tensor(weights, dtype=kept.dtype) @ kept)


def test_a_forecast_of_the_second_order_is_exact_for_a_parabola():
    computed, step = [0, 3, 4, 9], 13
    weights = residual_forecasts.FORECASTS["taylor-2"](computed, step)
    assert np.dot(weights, np.square(computed[-3:])) == pytest.approx(step**2)
    other = residual_forecasts.FORECASTS["taylorseer-2"](computed, step)
    assert sum(other) == pytest.approx(1.0) and np.dot(other, np.square(computed[-3:])) != pytest.approx(step**2)


@pytest.mark.parametrize("method", graph_taylor.METHODS, ids=lambda method: method.name)
def test_a_graph_with_a_forecast_is_the_best_of_its_candidates(bench, method):
    built = method.build(bench, 3)
    assert built.program.nfe == 3
    everything = slice(bench.calibration.count)
    best = bench.calibrated_psnr_db(scores_of(built.program), everything)
    for schedule in candidate_schedules(bench, 3).values():
        held = residual_forecasts.reuse_program(bench.table, schedule)
        if built.program.payload == "output":
            held = uniform_reuse_program(bench.table, schedule)
        assert best >= bench.calibrated_psnr_db(scores_of(held), everything) - 1e-6


# --- few-step solvers
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "unipc"])
def test_a_tuned_solver_is_no_worse_than_an_untuned_one_on_calibration(bench, name):
    method = next(each for each in solvers.METHODS if each.name == name)
    plain = baseline_programs(bench.pipeline.scheduler, bench.table, 4, bench.set_timesteps)[name]
    built, everything = method.build(bench, 4), slice(bench.calibration.count)
    assert built.program.nfe == 4 and built.setting
    untuned, tuned = (bench.calibrated_psnr_db(scores_of(each), everything) for each in (plain, built.program))
    assert tuned >= untuned - 1e-6


@pytest.mark.parametrize("disabled", [0, 2, 6])
def test_unipc_without_its_corrector_is_diffusers_own(disabled):
    """The program of a variant, and diffusers' scheduler itself with the same options, on a model of a formula."""
    options = {"flow_shift": 2.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    variants = solvers.multistep_variants(
        UniPCMultistepScheduler, {}, lambda budget: [{"disable_corrector": list(range(disabled))}]
    )
    base = FlowMatchEulerDiscreteScheduler(shift=2.0)
    _, solver, prepare = next(each for each in variants(base, 6, 2.0) if "shift 2" in each[0].split(",")[0])
    program = few_step_program(solver, 6, prepare)

    def model(x, t):
        return torch.sin(x) * (t / 1000) + 0.3 * x

    own = UniPCMultistepScheduler(disable_corrector=list(range(disabled)), **options)
    prepare(own, 6)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5))).float()
    expected = start
    for t in own.timesteps:
        expected = own.step(model(expected, float(t)), t, expected).prev_sample
    x, kept = start, []
    for step in program.steps:
        kept.append(model(x * step.input_scale, step.timestep))
        used = kept[len(kept) - len(step.output_coefs) :]
        x = step.latent_coef * x + sum(c * v for c, v in zip(step.output_coefs, used, strict=True))
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
