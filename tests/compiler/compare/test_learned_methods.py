"""Peers that are planned, learned or trained on calibration samples, against independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.calibration.scoring import final_latents, scores_of
from otcache.compiler.compare import bns, dpcache, l2p, output_forecasts, zeus
from otcache.compiler.compare.pipeline_method import run_pipeline
from otcache.compiler.compare.residual_forecasts import reuse_program
from otcache.compiler.compare.spectrum import FeatureModel
from otcache.compiler.compare.spent import metered
from otcache.compiler.programs.baselines import baseline_programs, uniform_reuse_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.solver_table import program_from_table

T = 12


@pytest.fixture(scope="module")
def table():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(T)
    return lower(scheduler)


@pytest.fixture(scope="module")
def outputs():
    """Of full runs: smooth ones (T, n, d) with a little noise, float64."""
    random = np.random.default_rng(0)
    basis = random.standard_normal((4, 20, 30))
    smooth = np.stack([sum(np.cos((k + 1) * s / T) * basis[k] for k in range(4)) for s in range(T)])
    return smooth + 0.01 * random.standard_normal(smooth.shape)


@pytest.fixture(scope="module")
def gram(outputs):
    vectors = outputs.reshape(T, -1)
    return vectors @ vectors.T / vectors.shape[1]


def walked(table, schedule, forecast, outputs):
    """The full sampler step by step: outputs at `schedule` are the recorded ones, `forecast(step, history)` the
    others'.
    """
    history, x = [], np.zeros(outputs.shape[1:])
    for step in range(T):
        history.append(outputs[step] if step in schedule else forecast(step, history))
        x = table.latent_coefs[step] * x + np.tensordot(table.output_coefs[step, : step + 1], np.stack(history), axes=1)
    return x


def run(program, outputs):
    kept, x = [], np.zeros(outputs.shape[1:])
    for step in program.steps:
        kept.append(outputs[step.step_index])
        used = kept[len(kept) - len(step.output_coefs) :]
        x = step.latent_coef * x + sum(c * v for c, v in zip(step.output_coefs, used, strict=True))
    return x


# --- L2P
# -----------------------------------------------------------------------------------------------------------------


def test_l2ps_training_is_the_released_loop_on_the_features_themselves(outputs, gram):
    """The released loop sees features (n, T, d); ours sees their inner products alone."""
    features = torch.from_numpy(outputs.swapaxes(0, 1).copy())
    weight = torch.eye(T, dtype=torch.float64)
    mask = torch.ones(T, T, dtype=torch.float64).tril()
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(201):
        loss = (torch.matmul(weight * mask, features)[:, :-1] - features[:, 1:]).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = (weight * mask).detach().numpy()
    np.testing.assert_allclose(l2p.trained_weights(gram)[:-1], expected[:-1], atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_l2ps_least_squares_are_numpys(outputs, gram, ridge):
    vectors = outputs.reshape(T, -1)
    size, penalty = vectors.shape[1], ridge * np.diag(gram).mean()
    for known, target in [([0, 1, 2], 3), ([0, 2, 5], 9), (list(range(6)), 6)]:
        newest = np.eye(len(known))[-1]
        # ‖Σ w V − V_t‖² / size + penalty ‖w − newest‖², as plain least squares on more rows.
        design = np.concatenate([vectors[known].T / np.sqrt(size), np.sqrt(penalty) * np.eye(len(known))])
        wanted = np.concatenate([vectors[target] / np.sqrt(size), np.sqrt(penalty) * newest])
        expected = np.linalg.lstsq(design, wanted, rcond=None)[0]
        np.testing.assert_allclose(l2p.fitted_row(gram, known, target, ridge), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, T - 1), max_size=5))
def test_l2ps_program_forecasts_from_forecasts(table, outputs, gram, steps):
    schedule, weights = (0, *sorted(steps)), l2p.fitted_weights(gram, 1e-3)
    program = output_forecasts.program_from_rows(table, schedule, l2p.rows_from_weights(weights, schedule))
    expected = walked(
        table, schedule, lambda step, known: np.tensordot(weights[step - 1, :step], np.stack(known), axes=1), outputs
    )
    np.testing.assert_allclose(run(program, outputs), expected, rtol=1e-4, atol=1e-4)


def test_l2p_from_computed_outputs_weighs_no_forecast(gram):
    schedule = (0, 3, 7)
    rows = l2p.rows_from_computed(gram, schedule, 1e-6)
    np.testing.assert_array_equal(rows[list(schedule)], np.eye(3))
    np.testing.assert_allclose(rows[9], l2p.fitted_row(gram, schedule, 9, 1e-6))
    assert not rows[:7, 2].any() and not rows[:3, 1].any()


@pytest.mark.parametrize("released", l2p.RELEASED)
def test_l2ps_released_lists_are_the_first_candidates_of_their_budgets(released):
    found = l2p.l2p_schedules(len(released), 50)
    assert found[0] == released
    assert all(len(set(each)) == len(released) and each[0] == 0 and each[-1] < 50 for each in found)


# --- ZEUS
# ----------------------------------------------------------------------------------------------------------------


def released_zeus(setting, table, outputs):
    """The released hook and step for flows, state for state: what the transformer keeps and what `step` makes of it."""
    kept, run, skip, held, computed = [None] * 3, 0, False, None, []
    x = np.zeros(outputs.shape[1:])
    for step in range(T):
        if skip:
            kept = [*kept[1:], kept[-1]]
            value = kept[-2] + (kept[-2] - kept[-3])
            if run % 2 == 1:
                held = value if run == 1 else held
                value = held
        else:
            computed.append(step)
            kept = [*kept[1:], outputs[step]]
            value = outputs[step]
        x = x + (table.sigmas[step + 1] - table.sigmas[step]) * value
        skip = False
        if kept[0] is not None and run < setting.longest:
            tail = setting.end if setting.tail is None else setting.tail
            if setting.start <= step < tail:
                skip = step % setting.period in range(setting.period - 1)
            elif tail <= step < setting.end:
                skip = step % setting.tail_period != 0
        run = run + 1 if skip else 0
    return tuple(computed), x


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        zeus.Setting,
        start=st.integers(3, 6),
        end=st.integers(8, T),
        period=st.integers(2, 6),
        tail=st.sampled_from([None, 7]),
        tail_period=st.sampled_from([3, 4]),
        longest=st.sampled_from([2, 4, 12]),
    )
)
def test_zeus_is_the_released_loop(table, outputs, setting):
    computed, expected = released_zeus(setting, table, outputs)
    assert zeus.zeus_schedule(setting, T) == computed
    program = output_forecasts.program_from_rows(table, computed, zeus.zeus_rows(computed, T))
    np.testing.assert_allclose(run(program, outputs), expected, rtol=1e-4, atol=1e-4)
    assert program.output_memory <= 2


@pytest.mark.parametrize("budget", [21, 23, 26, 27])
def test_zeus_demonstrations_are_candidates_of_their_budgets(budget):
    first = next(iter(zeus.zeus_settings(budget, 50).values()))
    assert first in zeus.DEMONSTRATIONS


def test_an_open_loop_error_is_the_distance_from_the_full_run(table, outputs, gram):
    schedule = (0, 4, 7)
    rows = zeus.zeus_rows(schedule, T)
    missed = np.tensordot(rows, outputs[list(schedule)], axes=1) - outputs
    gaps, x = 0.0, np.zeros(outputs.shape[1:])
    for step in range(T):
        x = x + (table.sigmas[step + 1] - table.sigmas[step]) * missed[step]
        gaps += np.square(x).mean()
    found = output_forecasts.open_loop_error(output_forecasts.full_run_jumps(table), gram, schedule, rows)
    assert found == pytest.approx(gaps, rel=1e-4)


# --- DPCache
# -------------------------------------------------------------------------------------------------------------


def path_cost(costs, schedule):
    """Of a path, edge by edge, each after the step before."""
    nodes = [*schedule, costs.shape[0]]
    total = costs[0, 0, nodes[1]]
    return total + sum(costs[a, i, j] for a, i, j in zip(nodes, nodes[1:], nodes[2:], strict=False))


@pytest.mark.parametrize(("first_steps", "longest"), [(3, 1.0), (1, 0.4), (2, 0.6)])
@pytest.mark.parametrize("budget", [3, 4, 6])
def test_dpcaches_plan_is_the_best_of_all_paths(budget, first_steps, longest):
    total = 9
    before, start, end = np.ogrid[:total, :total, : total + 1]
    possible = (end > start) & ((before < start) | ((before == 0) & (start == 0)))
    costs = np.where(possible, np.random.default_rng(budget).random(possible.shape), np.inf)
    span = max(1, int(longest * total))
    paths = [
        path
        for rest in itertools.combinations(range(1, total), budget - 1)
        if set(range(first_steps)) <= set(path := (0, *rest))
        and all(b - a <= span for a, b in itertools.pairwise([*path, total]))
    ]
    if not paths:
        with pytest.raises(ValueError, match="no path"):
            dpcache.planned_schedule(costs, budget, first_steps, longest)
        return
    found = dpcache.planned_schedule(costs, budget, first_steps, longest)
    assert found in paths
    assert path_cost(costs, found) == pytest.approx(min(path_cost(costs, path) for path in paths))


@pytest.mark.parametrize("order", dpcache.ORDERS)
def test_dpcaches_costs_are_those_of_the_released_forecast(order):
    """Divided differences of the features before, as the release computes them: recursively, from a short history."""
    features = np.random.default_rng(0).standard_normal((8, 5))

    def derivative(history, index, degree):
        if degree == 0:
            return features[history[index]]
        if index == 0:
            return None
        new, old = derivative(history, index, degree - 1), derivative(history, index - 1, degree - 1)
        return None if old is None else (new - old) / (history[index] - history[index - 1])

    def predict(history, at):
        terms = [derivative(history, len(history) - 1, degree) for degree in range(order + 1)]
        scales = [(at - history[-1]) ** degree / (1, 1, 2)[degree] for degree in range(order + 1)]
        return sum(scale * term for scale, term in zip(scales, terms, strict=True))

    tail = list(range(8 - order - 1, 8))
    beyond = 0.8 * predict(tail, 8) + 0.2 * features[tail].mean(axis=0)
    found = dpcache.edge_errors(features, order)
    for before, start, end in [(2, 4, 6), (1, 2, 7), (3, 6, 8)]:
        history = [*range(before - order + 1, before + 1), start]
        missed = [predict(history, at) - (beyond if at == 8 else features[at]) for at in range(start + 1, end + 1)]
        assert found[before, start, end] == pytest.approx(sum(np.abs(each).mean() for each in missed))
    assert np.isinf(found[5, 4, 6]) and np.isinf(found[2, 4, 4])


def test_dpcaches_program_is_taylorseers_on_its_plan(bench):
    built = next(method for method in dpcache.METHODS).build(bench, 4)
    assert built.program.nfe == 4 and built.program.payload == "residual" and built.full_runs == 1
    costs = bench.calibration.samples.map(dpcache.feature_costs(bench.table), bench.tuning)
    assert set(costs) == {"1", "2"} and costs["2"].shape[1:] == (8, 8, 9)
    assert dpcache.METHODS[0].model is FeatureModel


# --- BNS
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def euler(bench):
    return baseline_programs(bench.pipeline.scheduler, bench.table, 4, bench.set_timesteps)["euler"]


def test_bns_starts_from_its_solver_exactly(bench, euler):
    family = bns.Family(start=euler, table=bench.table)
    vector = np.zeros(family.size)
    assert family.size == 3 + (2 + 3 + 4 + 5)
    same = family.program(vector)
    for found, expected in zip(same.steps, euler.steps, strict=True):
        assert found.timestep == expected.timestep and found.input_scale == expected.input_scale
        assert found.latent_coef == expected.latent_coef
        assert found.output_coefs[-1] == expected.output_coefs[-1] and not any(found.output_coefs[:-1])
    rows = bench.calibration.samples.map(bns.final_errors(family, vector))
    ends = bench.calibration.samples.map(lambda batch: {"x": final_latents(euler, batch).numpy()})["x"]
    wanted = bench.calibration.samples.map(lambda batch: {"x": batch.latents(-1).numpy()})["x"]
    errors = np.square(ends - wanted).reshape(len(ends), -1).mean(axis=1)
    np.testing.assert_allclose(rows["loss"], np.log(errors), rtol=1e-3)


def test_bns_gradient_is_that_of_differences(bench, euler):
    family = bns.Family(start=euler, table=bench.table)
    vector = np.random.default_rng(0).normal(scale=0.02, size=family.size)

    def loss(at):
        return bench.calibration.samples.map(bns.final_errors(family, at))["loss"].mean()

    gradient = bench.calibration.samples.map(bns.final_errors(family, vector))["gradient"].mean(axis=0)
    for index in (0, 2, 3, 5, family.size - 1):  # times, then coefficients
        step = 1e-3 * np.eye(family.size)[index]  # times go through sines: a quarter of a unit of theirs
        difference = (loss(vector + step) - loss(vector - step)) / 2e-3
        assert gradient[index] == pytest.approx(difference, rel=0.05, abs=0.02)


def test_bns_training_helps_prompts_that_it_has_not_seen(bench, euler, monkeypatch):
    monkeypatch.setattr(bns, "ROUNDS", 30)
    family = bns.Family(start=euler, table=bench.table)
    trained = bns.trained_program(bench, euler)
    assert trained.nfe == 4 and trained != family.program(np.zeros(family.size))
    before, after = (bench.evaluation.map(scores_of(each))["latent_error"].mean() for each in (euler, trained))
    assert after < before


@pytest.mark.parametrize("module", [l2p, zeus, bns])
def test_methods_give_a_program_of_the_budget(bench, module, monkeypatch):
    monkeypatch.setattr(bns, "ROUNDS", 3)
    built = module.METHODS[0].build(bench, 4)
    assert built.program.nfe == 4 and built.program.payload == "output" and built.setting


def test_every_step_computed_is_the_full_run(bench):
    total = bench.table.num_inference_steps
    rows = zeus.zeus_rows(range(total), total)
    assert output_forecasts.program_from_rows(bench.table, range(total), rows) == program_from_table(bench.table)
    reuse = l2p.rows_from_weights(np.eye(total), (0, 3))
    assert output_forecasts.program_from_rows(bench.table, (0, 3), reuse) == uniform_reuse_program(bench.table, (0, 3))


# --- what it costs
# -------------------------------------------------------------------------------------------------------


def test_evaluations_are_counted_whole_and_in_stages(bench):
    """Four of eight steps, of outputs and of residuals, of all held-out samples; and the pipeline's own run."""
    outputs = uniform_reuse_program(bench.table, (0, 2, 4, 6))
    residuals = reuse_program(bench.table, (0, 2, 4, 6))
    for program, known in ((outputs, 1), (residuals, 0)):  # the full run's first output is known
        with metered(bench) as meter:
            bench.evaluation.map(scores_of(program))
        assert meter.spent().evaluations == pytest.approx((4 - known) * bench.count)
    with metered(bench) as meter:
        run_pipeline(bench, [0, 1], held_out=True)
    assert meter.spent().evaluations == pytest.approx(2 * bench.table.num_inference_steps)
    assert meter.spent().seconds > 0
