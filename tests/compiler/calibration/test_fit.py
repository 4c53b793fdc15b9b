"""The ridge against least squares on written-out regressors; a fitted program against a linear system that it can solve
exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equations import TOTAL, euler_table, normal, samples_from_equation
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration import fit
from otcache.compiler.calibration.fit import (
    SLOPE_PENALTY,
    STRAY,
    FittedStep,
    Stopped,
    fit_output_program,
    fit_step,
    ridge_step,
    sample_places,
    sample_weights,
)
from otcache.compiler.calibration.samples import StepStatistics
from otcache.compiler.calibration.step_statistics import combine, step_statistics
from otcache.compiler.programs.forecasts import forecast_coefs
from otcache.compiler.programs.update import apply_step
from otcache.schemas.arithmetic import log_change, update_latents
from otcache.schemas.program import position_axes


def ridge_on_rows(target, regressors, prior, penalty, weights=None, places=None) -> FittedStep:
    """`ridge_step` of what a fit is told of a target (n, …) and r regressors (n, …) each."""
    rows = np.stack([np.reshape(value, (len(target), -1)) for value in regressors], axis=1)
    remainder = np.reshape(target, (len(target), -1)) - np.asarray(prior) @ rows
    return ridge_step(
        rows @ rows.transpose(0, 2, 1), np.einsum("nrd,nd->nr", rows, remainder), prior, penalty, weights, places
    )


def test_ridge_finds_what_lies_in_the_span_and_the_prior_under_a_heavy_penalty():
    random = np.random.default_rng(0)
    latents, older, newest = random.normal(size=(3, 5, 9))
    target = 0.7 * latents - 0.2 * older + 1.5 * newest
    free = ridge_on_rows(target, [latents, older, newest], [1.0, 0.0, 1.0], 0.0)
    assert np.allclose(free.coefs, [0.7, -0.2, 1.5]) and np.allclose(free.crossed, free.coefs)
    held = ridge_on_rows(target, [latents, older, newest], [1.0, 0.0, 1.0], 1e9)
    assert np.allclose(held.coefs, [1.0, 0.0, 1.0], atol=1e-6) and np.allclose(held.crossed, held.coefs, atol=1e-6)


def test_ridge_is_the_augmented_least_squares():
    random = np.random.default_rng(1)
    latents, newest, target = random.normal(size=(3, 4, 6))
    penalty, prior = 0.3, np.array([0.9, 0.4])
    matrix = np.stack([latents.ravel(), newest.ravel()], axis=1)
    scale = np.sqrt(penalty) * np.diag(np.linalg.norm(matrix, axis=0))
    stacked = np.vstack([matrix, scale])
    expected = np.linalg.lstsq(stacked, np.concatenate([target.ravel(), scale @ prior]), rcond=None)[0]
    assert np.allclose(ridge_on_rows(target, [latents, newest], prior, penalty).coefs, expected)


def test_each_sample_is_left_out_of_its_own_coefficients():
    random = np.random.default_rng(4)
    target, latents, older, newest = random.normal(size=(4, 5, 3, 2))
    found = ridge_on_rows(target, [latents, older, newest], [1.0, 0.0, 0.5], 0.1)
    for sample in range(5):
        others = [np.delete(value, sample, axis=0) for value in (target, latents, older, newest)]
        alone = ridge_on_rows(others[0], others[1:], [1.0, 0.0, 0.5], 0.1)
        assert np.allclose(found.crossed[sample], alone.coefs)
    only = ridge_on_rows(target[:1], [latents[:1], older[:1]], [1.0, 0.0], 0.1)
    assert np.array_equal(only.crossed, only.coefs[None])


def test_a_weight_of_two_counts_a_sample_twice():
    random = np.random.default_rng(5)
    target, latents, output = random.normal(size=(3, 4, 6))
    twice = [np.concatenate([value, value[:1]]) for value in (target, latents, output)]
    expected = ridge_on_rows(twice[0], twice[1:], [1.0, 0.0], 0.2).coefs
    found = ridge_on_rows(target, [latents, output], [1.0, 0.0], 0.2, np.array([2.0, 1.0, 1.0, 1.0]))
    assert np.allclose(found.coefs, expected)


def least_squares(target, regressors, prior, penalty, weights, places):
    """(f, r): the same minimum by least squares on all elements of all samples, penalties as rows of their own."""
    samples, count = len(target), len(regressors)
    rows = np.stack([np.reshape(value, (samples, -1)) for value in regressors], axis=-1)  # (n, d, r)
    if places is not None:
        rows = np.concatenate([rows, places[:, None, None] * rows], axis=-1)
    rows = np.sqrt(weights)[:, None, None] * rows
    matrix = rows.reshape(-1, rows.shape[-1])
    goal = (np.sqrt(weights)[:, None] * np.reshape(target, (samples, -1))).ravel()
    centre = np.concatenate([prior, np.zeros(matrix.shape[1] - count)])
    penalties = np.repeat([penalty, SLOPE_PENALTY], count)[: matrix.shape[1]]
    held = np.diag(np.sqrt(penalties) * np.linalg.norm(matrix, axis=0))
    stacked, wanted = np.vstack([matrix, held]), np.concatenate([goal, held @ centre])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0].reshape(-1, count)


@given(st.integers(0, 999), st.integers(2, 9), st.integers(1, 4), st.booleans(), st.floats(1e-6, 1.0))
def test_ridge_is_least_squares_on_the_stacked_data(seed, samples, outputs, with_places, penalty):
    """Slopes, weights and leave-one-out alike, to 1e-9 of the coefficients."""
    random = np.random.default_rng(seed)
    target, *regressors = random.normal(size=(2 + outputs, samples, 15))
    prior, weights = random.normal(size=1 + outputs), random.uniform(0.1, 1.0, size=samples)
    places = random.uniform(-2.5, 2.5, size=samples) if with_places else None
    found = ridge_on_rows(target, regressors, prior, penalty, weights, places)
    assert found.coefs == pytest.approx(
        least_squares(target, regressors, prior, penalty, weights, places), rel=1e-9, abs=1e-9
    )
    for sample in range(samples):
        others = np.arange(samples) != sample
        alone = least_squares(
            target[others],
            [value[others] for value in regressors],
            prior,
            penalty,
            weights[others],
            None if places is None else places[others],
        )
        assert found.crossed[sample] == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_a_stray_counts_as_if_it_were_at_the_limit():
    assert sample_weights(np.array([1.0, 1.0, 1.0, 1.0, 100.0])) == pytest.approx([1, 1, 1, 1, (STRAY / 100) ** 2])
    assert np.array_equal(sample_weights(np.zeros(5)), np.ones(5))


def test_places_are_for_enough_samples_that_differ():
    change = np.linspace(-3.0, -1.0, 9)
    places = sample_places(change)
    assert places.values == pytest.approx((change + 2.0) / change.std())
    assert sample_places(None) is None and sample_places(change[: fit.FEWEST - 1]) is None
    assert sample_places(np.full(9, -1.5)) is None
    assert sample_places(np.array([0.0] * 30 + [9.0])).values.max() == fit.FARTHEST


def test_two_equal_outputs_do_not_break_the_fit():
    random = np.random.default_rng(2)
    latents, output = random.normal(size=(2, 4, 6))
    coefs = ridge_on_rows(latents + 2 * output, [latents, output, output], [1.0, 0.0, 1.0], 1e-5).coefs
    assert coefs[0, 0] * latents + coefs[0, 1:].sum() * output == pytest.approx(latents + 2 * output, abs=1e-3)


def test_slopes_are_found_where_coefficients_follow_a_place():
    random = np.random.default_rng(6)
    latents, older, newest = random.normal(size=(3, 9, 40))
    places = random.normal(size=9)
    each = np.outer(np.ones(9), [0.9, -0.3, 1.2]) + np.outer(places, [0.05, 0.2, -0.4])
    target = sum(c[:, None] * value for c, value in zip(each.T, (latents, older, newest), strict=True))
    found = ridge_on_rows(target, [latents, older, newest], [1.0, 0.0, 1.0], 0.0, places=places)
    assert np.allclose(found.coefs, [[0.9, -0.3, 1.2], [0.05, 0.2, -0.4]], atol=2e-3)
    assert found.crossed.shape == (9, 2, 3) and np.allclose(found.crossed, found.coefs, atol=5e-3)


def prior_of(weight):
    """Every output weighs the same."""
    return lambda computed, end: (1.0, np.full(len(computed), weight))


def fitted_program(samples, schedule, weight, memory=4):
    found = fit_output_program(samples, schedule, prior_of(weight), samples.evaluator.table, memory=memory)
    return found.program, found.drifts[-1], found


def two_kinds(folder, samples):
    """x' = −k·x with k of every sample its own: what an output weighs depends on k, which its change gives away."""
    held = samples_from_equation(
        folder, normal(samples, 3, seed=1), lambda x, step, k: -k * x, k=torch.linspace(0.5, 2.5, samples)
    )
    return fitted_program(held, (0, 3, 6, 9), 0.25, memory=2)[:2]


def test_coefficients_follow_samples_whose_outputs_change_differently(tmp_path, monkeypatch):
    program, error = two_kinds(tmp_path / "a", 16)
    assert program.payload == "adaptive" and [step.slopes is not None for step in program.steps] == [
        False,
        True,
        True,
        True,
    ]
    monkeypatch.setattr(fit, "FEWEST", 17)
    plain, plain_error = two_kinds(tmp_path / "b", 16)
    assert plain.payload == "output" and not any(step.slopes for step in plain.steps)
    assert error < 0.7 * plain_error


def statistics_of(latents, outputs, here, target, prior) -> StepStatistics:
    """Of tensors (n, …) each."""
    found = [
        step_statistics(
            latents[row].numpy(), [v[row].numpy() for v in outputs], here[row].numpy(), target[row].numpy(), prior
        )
        for row in range(len(latents))
    ]
    gram, cross, distance, size = (np.stack(values) for values in zip(*found, strict=True))
    change = log_change(outputs[-2], outputs[-1]).double().numpy() if len(outputs) > 1 else None
    return StepStatistics(gram=gram, cross=cross, distance=distance, size=size, change=change, evaluations=0)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 3, 4, 2)])
def test_an_update_is_the_same_everywhere(shape):
    """One update in the fit, in torch's roll-outs and scheduler, and in the runtime: with the coefficients that are
    fitted to all samples.
    """
    outputs = list(normal(3, 10, *shape, seed=2))
    latents, here = normal(10, *shape, seed=3), normal(10, *shape, seed=4)
    target = latents + outputs[-1] + 0.5 * outputs[0].mean(position_axes(1 + len(shape)), keepdim=True)
    prior = np.array([1.0, 0.0, 0.0, 0.0])
    found = statistics_of(latents, outputs, here, target, prior)
    step, _ = fit_step(found, 0, prior, 1e-5, euler_table())
    assert step.means is not None and step.slopes is not None
    places = sample_places(found.change)
    fitted = ridge_step(
        found.gram,
        found.cross,
        np.concatenate([prior, np.zeros(4)]),
        1e-5,
        sample_weights(found.distance),
        places.values,
    )
    weights = (fitted.coefs[0] + places.values[:, None] * fitted.coefs[1]).astype(np.float32)
    combined = torch.cat(
        [combine(weights[row], [each[row : row + 1] for each in (latents, *outputs)]) for row in range(10)]
    )
    assert torch.allclose(combined, target, atol=1e-2)
    served = update_latents(step, latents.numpy(), [v.numpy() for v in outputs], outputs_first=True)
    assert np.allclose(served, combined.numpy(), atol=1e-5)
    assert torch.allclose(apply_step(step, latents, outputs), combined, atol=1e-5)


def two_bands(folder, samples):
    """x' = −k·x with k = 1 for means over the positions, 2 and 4 for what is around them in two channels.

    Two coefficients are too few for three rates, and enough where means have two of their own.
    """

    def rate(x, step, k):
        means = x.mean(1, keepdim=True)
        return -torch.tensor([2.0, 4.0]) * (x - means) - means

    held = samples_from_equation(folder, normal(samples, 5, 2, seed=1), rate)
    return fitted_program(held, (0,), 0.5)[:2]


def test_means_are_weighed_apart_from_what_is_around_them(tmp_path):
    program, error = two_bands(tmp_path / "a", 16)
    assert program.payload == "banded" and all(step.means for step in program.steps)
    plain, plain_error = two_bands(tmp_path / "b", fit.FEWEST - 1)
    assert plain.payload == "output" and not any(step.means for step in plain.steps)
    assert error < 0.05 * plain_error


@pytest.mark.parametrize("schedule", [(0,), (0, 5), (0, 1, 2, 8)])
def test_a_linear_model_is_sampled_exactly_at_any_budget(schedule, tmp_path):
    """x' = −x: two numbers say all, so two coefficients are enough."""
    samples = samples_from_equation(tmp_path, normal(6, 2), lambda x, step, k: -x)
    program, error, found = fitted_program(samples, schedule, 1.0 / TOTAL)
    assert program.schedule == schedule and program.nfe == len(schedule)
    assert error < 1e-5 and found.scores["psnr_db"].min() > 80 and found.scores["psnr_db"].shape == (6,)
    assert len(found.drifts) == len(schedule) + 1 and found.drifts[0] == 0.0


def test_drift_is_corrected_at_the_next_step(tmp_path):
    """A target that moves on its own in the first jump is met again after the second, from where the program is.

    The full run is pushed in a direction that the first step does not see, and the second one's output has.
    """

    def rate(x, step, k):
        return -x + 0.3 * (step == 4)

    def pushed(x, step, k):
        return rate(x, step, k) + 0.3 * ((step > 0) & (step < 4))

    samples = samples_from_equation(tmp_path, normal(6, 2), rate, full_rate=pushed)
    program, error, found = fitted_program(samples, (0, 4, 8), 0.3)
    assert found.drifts[0] == 0.0 and found.drifts[1] > 0.05
    assert max(found.drifts[2], error) < 0.1 * found.drifts[1]
    assert [len(step.output_coefs) for step in program.steps] == [1, 2, 3]


def test_a_walk_that_drifts_is_given_up_where_it_is_told_so(tmp_path):
    samples = samples_from_equation(tmp_path, normal(6, 2), lambda x, step, k: -x.square())
    told = []

    def stop(position, drift):
        told.append((position, drift))
        return position == 2

    with pytest.raises(Stopped) as stopped:
        fit_output_program(samples, (0, 3, 6, 9), prior_of(0.25), samples.evaluator.table, stop=stop)
    assert [position for position, _ in told] == [0, 1, 2] and told[0][1] == 0.0 < told[2][1]
    assert stopped.value.evaluations == samples.evaluator.transformer.evaluations == 2 * 6, "the first is known"


@given(
    st.lists(st.integers(0, 30), min_size=3, max_size=6, unique=True).map(sorted),
    st.integers(0, 2),
    st.integers(31, 40),
)
def test_forecasts_are_exact_on_polynomials(computed, order, step_index):
    coefs = forecast_coefs(computed, step_index, order)
    assert len(coefs) == order + 1
    for degree in range(order + 1):
        values = [float(node) ** degree for node in computed[-(order + 1) :]]
        assert np.dot(coefs, values) == pytest.approx(float(step_index) ** degree, rel=1e-6, abs=1e-6)


def test_forecasts_from_one_value_reuse_it():
    assert forecast_coefs([4], 9, 2) == (1.0,)
