"""The ridge against closed forms; a fitted program against a linear system that it can solve exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.capture import Trajectory
from otcache.compiler.fit import fit_output_program, forecast_coefs, ridge_step


def test_ridge_finds_what_lies_in_the_span_and_the_prior_under_a_heavy_penalty():
    random = np.random.default_rng(0)
    latents, older, newest = random.normal(size=(3, 5, 9))
    target = 0.7 * latents - 0.2 * older + 1.5 * newest
    latent_coef, output_coefs = ridge_step(target, latents, [older, newest], (1.0, [0.0, 1.0]), 0.0)
    assert np.allclose([latent_coef, *output_coefs], [0.7, -0.2, 1.5])
    latent_coef, output_coefs = ridge_step(target, latents, [older, newest], (1.0, [0.0, 1.0]), 1e9)
    assert np.allclose([latent_coef, *output_coefs], [1.0, 0.0, 1.0], atol=1e-6)


def test_ridge_is_the_augmented_least_squares():
    random = np.random.default_rng(1)
    latents, newest, target = random.normal(size=(3, 4, 6))
    penalty, prior = 0.3, np.array([0.9, 0.4])
    matrix = np.stack([latents.ravel(), newest.ravel()], axis=1)
    scale = np.sqrt(penalty) * np.diag(np.linalg.norm(matrix, axis=0))
    stacked = np.vstack([matrix, scale])
    expected = np.linalg.lstsq(stacked, np.concatenate([target.ravel(), scale @ prior]), rcond=None)[0]
    latent_coef, output_coefs = ridge_step(target, latents, [newest], (prior[0], prior[1:]), penalty)
    assert np.allclose([latent_coef, *output_coefs], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_dtype_are_read_with_and_without_gradients(dtype):
    latents, output = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    target = 0.5 * latents.double() + 2 * output.double()
    found = ridge_step(target, latents.requires_grad_(), [output], (1.0, [0.0]), 0.0)
    assert np.allclose([found[0], *found[1]], [0.5, 2.0])


def test_two_equal_outputs_do_not_break_the_fit():
    random = np.random.default_rng(2)
    latents, output = random.normal(size=(2, 4, 6))
    latent_coef, output_coefs = ridge_step(latents + 2 * output, latents, [output, output], (1.0, [0.0, 1.0]), 1e-5)
    assert latent_coef * latents + output_coefs.sum() * output == pytest.approx(latents + 2 * output, abs=1e-3)


def linear_trajectory(total=12, samples=6):
    """x' = −x along one direction and a constant along the other: two numbers say all, so two coefficients are enough."""
    start = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    latents, outputs = [start], []
    for _ in range(total):
        outputs.append(-latents[-1])
        latents.append(latents[-1] + outputs[-1] / total)
    return Trajectory(
        latents=torch.stack(latents), outputs=torch.stack(outputs), conditioning={}, guidance=torch.ones(samples),
        timesteps=tuple(range(total)),
    )  # fmt: skip


@pytest.mark.parametrize("schedule", [(0,), (0, 5), (0, 1, 2, 8)])
def test_a_linear_model_is_sampled_exactly_at_any_budget(schedule):
    trajectory = linear_trajectory()
    program, latents = fit_output_program(
        lambda x, step: -x, trajectory, schedule, lambda computed, end: (1.0, np.full(len(computed), 1.0 / 12)),
        timesteps=np.arange(12) * 1.0, input_scales=np.ones(12),
    )  # fmt: skip
    assert program.schedule == schedule and program.nfe == len(schedule)
    assert torch.allclose(latents, trajectory.latents[-1], atol=1e-5)


def test_drift_is_corrected_at_the_next_step():
    """A target that moves on its own in the first jump is met again after the second, from where the program is."""
    trajectory = linear_trajectory()
    program, latents = fit_output_program(
        lambda x, step: -x + (0.3 if step == 0 else 0.0), trajectory, (0, 4, 8),
        lambda computed, end: (1.0, np.full(len(computed), 0.3)), timesteps=np.arange(12), input_scales=np.ones(12),
    )  # fmt: skip
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
