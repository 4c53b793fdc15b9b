"""Peers that are programs, against independent computations of what their papers say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.calibration.rollout import roll_out
from otcache.compiler.compare import program_methods as programs
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import residual_program
from otcache.compiler.programs.solver_table import program_from_table
from otcache.compiler.schedules.gram import statistics_from_trajectory
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
    found = programs.chebyshev_coefs(computed, target, 50) @ features
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
    assert programs.spectrum_schedule(5, 2.0, 0.75, 50) == tuple(expected)
    assert programs.spectrum_schedule(3, 1.0, 0.0, 10) == tuple(range(10))


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
    found = run(programs.meancache_program(solver, schedule, orders), x[None], outputs)
    expected = released_meancache(solver.sigmas, schedule, orders, x, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_meancache_edges_are_the_errors_of_its_forecast(table, trajectory):
    latents, outputs = trajectory
    statistics = statistics_from_trajectory(latents[:, :, None], outputs[:, :, None])
    errors, orders = programs.meancache_edges(table, statistics)
    moves = np.diff(table.sigmas)
    for start, end in itertools.combinations(range(T + 1), 2):
        costs = []
        for order in programs.JVP_ORDERS if start else (1,):
            rows = programs.mean_velocity_coefs(table.sigmas, start, end, order, np.eye(start + 1, T))
            missed = np.tensordot(moves[start:end] @ (rows[start:end] - np.eye(T)[start:end]), outputs, axes=1)
            costs.append(np.mean(missed**2))
        assert errors[start, end] == pytest.approx(min(costs), rel=1e-6, abs=1e-12)
        assert costs[orders[start, end] - 1] == pytest.approx(min(costs), rel=1e-6, abs=1e-12)
    assert np.allclose(np.diagonal(errors, offset=1), 0.0)


def test_meancache_with_every_step_is_the_full_run(table, trajectory):
    latents, outputs = trajectory
    program = programs.meancache_program(table, tuple(range(T)), np.ones((T, T + 1), dtype=int))
    np.testing.assert_allclose(run(program, latents, outputs), latents[-1], atol=1e-6)
    assert program.nfe == T


def test_order_one_is_plain_reuse(table):
    rows = programs.mean_velocity_coefs(table.sigmas, 3, 7, 1, np.eye(4, T))
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
    found = programs.annealed_schedule(loss, budget, 10, iterations=200, rounds=20, seed=0)
    assert loss(found) == pytest.approx(best)
    assert found == programs.annealed_schedule(loss, budget, 10, iterations=200, rounds=20, seed=0)


def test_spectrum_program_with_every_step_is_the_full_run(table):
    program = programs.spectrum_program(table, tuple(range(T)))
    assert program == program_from_table(table, payload="residual")


# --- LeMiCa
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [25, 3])
def test_jump_errors_are_those_of_one_replay_for_each_edge(bench, monkeypatch, span):
    monkeypatch.setattr(programs, "LEMICA_SPAN", span)
    calibration, total = programs.few(bench.calibration, 2), bench.table.num_inference_steps
    latents = calibration.trajectory.latents
    for start in range(total):
        found = programs.jump_errors(bench.table, calibration, start)
        assert found.shape == (max(0, total - start - 1),)
        for end in range(start + 2, total + 1):
            if end - start > span:
                assert found[end - start - 2] == np.inf
                continue
            schedule = [index for index in range(total) if not start < index < end]
            steps = residual_program(bench.table, schedule, "reuse", np.zeros((total, total))).steps[start:]
            program = Program(payload="residual", steps=steps)
            final = roll_out(program, calibration.denoiser, latents[start], calibration.stages)
            expected = float((final - latents[-1]).square().mean())
            assert found[end - start - 2] == pytest.approx(expected, rel=1e-3, abs=1e-9), (start, end)
