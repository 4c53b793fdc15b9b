"""The ridge against closed forms; a fitted program against a linear system that it can solve exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration import fit
from otcache.compiler.calibration.fit import STRAY, fit_output_program, ridge_step, sample_weights
from otcache.compiler.pipelines.trajectory import Trajectory
from otcache.compiler.programs.forecasts import forecast_coefs
from otcache.compiler.programs.update import mean, updated
from otcache.schemas.arithmetic import update_latents
from otcache.schemas.program import Step


def test_ridge_finds_what_lies_in_the_span_and_the_prior_under_a_heavy_penalty():
    random = np.random.default_rng(0)
    latents, older, newest = random.normal(size=(3, 5, 9))
    target = 0.7 * latents - 0.2 * older + 1.5 * newest
    free = ridge_step(target, [latents, older, newest], [1.0, 0.0, 1.0], 0.0)
    assert np.allclose(free.coefs, [0.7, -0.2, 1.5]) and np.allclose(free.crossed, free.coefs)
    held = ridge_step(target, [latents, older, newest], [1.0, 0.0, 1.0], 1e9)
    assert np.allclose(held.coefs, [1.0, 0.0, 1.0], atol=1e-6) and np.allclose(held.crossed, held.coefs, atol=1e-6)


def test_ridge_is_the_augmented_least_squares():
    random = np.random.default_rng(1)
    latents, newest, target = random.normal(size=(3, 4, 6))
    penalty, prior = 0.3, np.array([0.9, 0.4])
    matrix = np.stack([latents.ravel(), newest.ravel()], axis=1)
    scale = np.sqrt(penalty) * np.diag(np.linalg.norm(matrix, axis=0))
    stacked = np.vstack([matrix, scale])
    expected = np.linalg.lstsq(stacked, np.concatenate([target.ravel(), scale @ prior]), rcond=None)[0]
    assert np.allclose(ridge_step(target, [latents, newest], prior, penalty).coefs, expected)


def test_each_sample_is_left_out_of_its_own_coefficients():
    random = np.random.default_rng(4)
    target, latents, older, newest = random.normal(size=(4, 5, 3, 2))
    found = ridge_step(target, [latents, older, newest], [1.0, 0.0, 0.5], 0.1)
    for sample in range(5):
        others = [np.delete(value, sample, axis=0) for value in (target, latents, older, newest)]
        alone = ridge_step(others[0], others[1:], [1.0, 0.0, 0.5], 0.1)
        assert np.allclose(found.crossed[sample], alone.coefs)
    only = ridge_step(target[:1], [latents[:1], older[:1]], [1.0, 0.0], 0.1)
    assert np.array_equal(only.crossed, only.coefs[None])


def test_a_weight_of_two_counts_a_sample_twice():
    random = np.random.default_rng(5)
    target, latents, output = random.normal(size=(3, 4, 6))
    twice = [np.concatenate([value, value[:1]]) for value in (target, latents, output)]
    expected = ridge_step(twice[0], twice[1:], [1.0, 0.0], 0.2).coefs
    found = ridge_step(target, [latents, output], [1.0, 0.0], 0.2, np.array([2.0, 1.0, 1.0, 1.0]))
    assert np.allclose(found.coefs, expected)


def test_a_stray_counts_as_if_it_were_at_the_limit():
    references = np.zeros((5, 3))
    latents = np.diag([1.0, 1.0, 1.0, 1.0, 100.0])[:, :3] + np.array([[0, 0, 0]] * 3 + [[1, 0, 0], [60, 80, 0]])
    assert sample_weights(latents, references) == pytest.approx([1, 1, 1, 1, (STRAY / 100) ** 2])
    assert np.array_equal(sample_weights(references, references), np.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_dtype_are_read_with_and_without_gradients(dtype):
    latents, output = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    target = 0.5 * latents.double() + 2 * output.double()
    assert np.allclose(ridge_step(target, [latents.requires_grad_(), output], [1.0, 0.0], 0.0).coefs, [0.5, 2.0])


def test_two_equal_outputs_do_not_break_the_fit():
    random = np.random.default_rng(2)
    latents, output = random.normal(size=(2, 4, 6))
    coefs = ridge_step(latents + 2 * output, [latents, output, output], [1.0, 0.0, 1.0], 1e-5).coefs
    assert coefs[0, 0] * latents + coefs[0, 1:].sum() * output == pytest.approx(latents + 2 * output, abs=1e-3)


def test_slopes_are_found_where_coefficients_follow_a_place():
    random = np.random.default_rng(6)
    latents, older, newest = random.normal(size=(3, 9, 40))
    places = random.normal(size=9)
    each = np.outer(np.ones(9), [0.9, -0.3, 1.2]) + np.outer(places, [0.05, 0.2, -0.4])
    target = sum(c[:, None] * value for c, value in zip(each.T, (latents, older, newest), strict=True))
    found = ridge_step(target, [latents, older, newest], [1.0, 0.0, 1.0], 0.0, places=places)
    assert np.allclose(found.coefs, [[0.9, -0.3, 1.2], [0.05, 0.2, -0.4]], atol=2e-3)
    assert found.crossed.shape == (9, 2, 3) and np.allclose(found.crossed, found.coefs, atol=5e-3)


def full_runs(start, rate, total=12):
    """Of x' = rate(x) from `start` (n, …), in Euler's steps of 1 / `total`."""
    latents, outputs = [start], []
    for _ in range(total):
        outputs.append(rate(latents[-1]))
        latents.append(latents[-1] + outputs[-1] / total)
    return Trajectory(
        latents=torch.stack(latents),
        outputs=torch.stack(outputs),
        conditioning={},
        guidance=torch.ones(len(start)),
        timesteps=tuple(range(total)),
    )


def two_kinds(samples):
    """x' = −k·x with k of every sample its own: what an output weighs depends on k, which its change gives away."""
    rates = torch.linspace(0.5, 2.5, samples)[:, None]
    start = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    trajectory = full_runs(start, lambda x: -rates * x)
    program, final = fit_output_program(
        lambda x, step: -rates * x,
        trajectory,
        (0, 3, 6, 9),
        lambda computed, end: (1.0, np.full(len(computed), 0.25)),
        timesteps=np.arange(12),
        input_scales=np.ones(12),
        memory=2,
    )
    return program, float((final - trajectory.latents[-1]).norm() / trajectory.latents[-1].norm())


def test_coefficients_follow_samples_whose_outputs_change_differently(monkeypatch):
    program, error = two_kinds(16)
    assert program.payload == "adaptive" and [step.slopes is not None for step in program.steps] == [
        False,
        True,
        True,
        True,
    ]
    monkeypatch.setattr(fit, "FEWEST", 17)
    plain, plain_error = two_kinds(16)
    assert plain.payload == "output" and not any(step.slopes for step in plain.steps)
    assert error < 0.7 * plain_error


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 3, 4, 2)])
def test_an_update_is_the_same_everywhere(shape):
    """One update in the fit, in torch's roll-outs and scheduler, and in the runtime."""
    outputs = list(torch.randn(3, 10, *shape, generator=torch.Generator().manual_seed(2)))
    latents = torch.randn(10, *shape, generator=torch.Generator().manual_seed(3))
    places = fit.sample_places(outputs)
    terms = [latents, *outputs, *(mean(value).expand_as(value) for value in (latents, *outputs))]
    target = latents + outputs[-1] + 0.5 * terms[4]
    fitted = ridge_step(target, terms, [1.0, *[0.0] * 7], 1e-5, places=places.values)
    step = Step(
        step_index=0,
        timestep=0.0,
        latent_coef=fitted.coefs[0, 0],
        output_coefs=fitted.coefs[0, 1:4],
        slopes=fit._slopes(places, fitted.coefs[1, :4]),
        means=fit._means(fitted.coefs[:, 4:]),
    )
    here = fit._combined(fitted.coefs[None], places.values, terms)
    assert torch.allclose(here, target, atol=1e-2)
    served = update_latents(step, latents.numpy(), [v.numpy() for v in outputs], outputs_first=True)
    assert np.allclose(served, here.numpy(), atol=1e-5)
    assert torch.allclose(updated(step, latents, outputs), here, atol=1e-5)


def two_bands(samples):
    """x' = −k·x with k = 1 for means over the positions, 2 and 4 for what is around them in two channels.

    Two coefficients are too few for three rates, and enough where means have two of their own.
    """

    def rate(x):
        means = x.mean(1, keepdim=True)
        return -torch.tensor([2.0, 4.0]) * (x - means) - means

    trajectory = full_runs(torch.randn(samples, 5, 2, generator=torch.Generator().manual_seed(1)), rate)
    program, final = fit_output_program(
        lambda x, step: rate(x),
        trajectory,
        (0,),
        lambda computed, end: (1.0, np.full(len(computed), 0.5)),
        timesteps=np.arange(12),
        input_scales=np.ones(12),
    )
    return program, float((final - trajectory.latents[-1]).norm() / trajectory.latents[-1].norm())


def test_means_are_weighed_apart_from_what_is_around_them():
    program, error = two_bands(16)
    assert program.payload == "banded" and all(step.means for step in program.steps)
    plain, plain_error = two_bands(fit.FEWEST - 1)
    assert plain.payload == "output" and not any(step.means for step in plain.steps)
    assert error < 0.05 * plain_error


def linear_trajectory(total=12, samples=6):
    """x' = −x along one direction and a constant along the other: two numbers say all, so two coefficients are enough."""
    return full_runs(torch.randn(samples, 2, generator=torch.Generator().manual_seed(0)), lambda x: -x, total)


@pytest.mark.parametrize("schedule", [(0,), (0, 5), (0, 1, 2, 8)])
def test_a_linear_model_is_sampled_exactly_at_any_budget(schedule):
    trajectory = linear_trajectory()
    program, latents = fit_output_program(
        lambda x, step: -x,
        trajectory,
        schedule,
        lambda computed, end: (1.0, np.full(len(computed), 1.0 / 12)),
        timesteps=np.arange(12) * 1.0,
        input_scales=np.ones(12),
    )
    assert program.schedule == schedule and program.nfe == len(schedule)
    assert torch.allclose(latents, trajectory.latents[-1], atol=1e-5)


def test_drift_is_corrected_at_the_next_step():
    """A target that moves on its own in the first jump is met again after the second, from where the program is."""
    trajectory = linear_trajectory()
    program, latents = fit_output_program(
        lambda x, step: -x + (0.3 if step == 0 else 0.0),
        trajectory,
        (0, 4, 8),
        lambda computed, end: (1.0, np.full(len(computed), 0.3)),
        timesteps=np.arange(12),
        input_scales=np.ones(12),
    )
    assert torch.allclose(latents, trajectory.latents[-1], atol=2e-2)
    assert [len(step.output_coefs) for step in program.steps] == [1, 2, 3]


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
