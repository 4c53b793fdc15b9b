"""The step's arithmetic: numpy and torch against one another and against the definition, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.schemas.arithmetic import (
    latents_from_noise,
    log_change,
    mean_over_positions,
    noise_from_latents,
    place_among_samples,
    update_latents,
    weighted_sum,
)
from otcache.schemas.program import FARTHEST, TINY, Means, Slopes, Step

numbers = st.floats(-1.5, 1.5, width=32)


@st.composite
def steps(draw):
    """A step that weighs up to four outputs, with or without slopes and means."""
    count = draw(st.integers(0, 4))
    coefs = st.lists(numbers, min_size=count, max_size=count)
    slopes = means = None
    if count >= 2 and draw(st.booleans()):
        slopes = Slopes(
            centre=draw(numbers), spread=draw(st.floats(0.1, 2)), latent_coef=draw(numbers), output_coefs=draw(coefs)
        )
    if count and draw(st.booleans()):
        extra = {"latent_slope": draw(numbers), "output_slopes": draw(coefs)} if slopes else {}
        means = Means(latent_coef=draw(numbers), output_coefs=draw(coefs), **extra)
    return Step(
        step_index=9, timestep=0.0, latent_coef=draw(numbers), output_coefs=draw(coefs), slopes=slopes, means=means
    )


def arrays(seed, outputs, shape=(2, 3, 4)):
    return list(np.random.default_rng(seed).standard_normal((1 + outputs, *shape)).astype(np.float32))


def defined(step, x, outputs):
    """One sample's update in float64, as `Step`, `Slopes` and `Means` define it; x (tokens, channels)."""
    used = outputs[len(outputs) - len(step.output_coefs) :]
    coefs, place = np.array([step.latent_coef, *step.output_coefs]), 0.0
    if slopes := step.slopes:
        moved, size = (max(float(np.square(part).sum()), TINY) for part in (outputs[-1] - outputs[-2], outputs[-1]))
        change = 0.5 * math.log(moved / size)
        place = min(max((change - slopes.centre) / slopes.spread, -FARTHEST), FARTHEST)
        coefs = coefs + place * np.array([slopes.latent_coef, *slopes.output_coefs])
    total = sum(coef * value for coef, value in zip(coefs, [x, *used], strict=True))
    if means := step.means:
        coefs = np.array([means.latent_coef, *means.output_coefs])
        if step.slopes:
            coefs = coefs + place * np.array([means.latent_slope, *means.output_slopes])
        total = total + sum(coef * value.mean(axis=0) for coef, value in zip(coefs, [x, *used], strict=True))
    return total


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(0, 5), st.booleans())
def test_both_libraries_do_what_the_schema_defines(step, seed, outputs_first):
    x, *outputs = arrays(seed, max(len(step.output_coefs), 1))
    before = x.copy()
    found = update_latents(step, x, outputs, outputs_first=outputs_first)
    tensor = update_latents(
        step, torch.from_numpy(x), [torch.from_numpy(v) for v in outputs], outputs_first=outputs_first
    )
    wanted = [defined(step, x[i].astype(float), [v[i].astype(float) for v in outputs]) for i in range(len(x))]
    assert found.dtype == np.float32 and tensor.dtype == torch.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tensor.numpy(), found, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, before)


def test_a_step_of_plain_coefficients_has_the_same_bits_in_both_libraries():
    step = Step(step_index=3, timestep=0.0, latent_coef=0.3, output_coefs=(0.1, -0.7, 1.9))
    x, *outputs = arrays(0, 3)
    for outputs_first in (False, True):
        found = update_latents(step, x, outputs, outputs_first=outputs_first)
        tensor = update_latents(
            step, torch.from_numpy(x), list(map(torch.from_numpy, outputs)), outputs_first=outputs_first
        )
        np.testing.assert_array_equal(found, tensor.numpy())


def test_the_orders_of_addition_are_those_that_are_named():
    """In float32 1e8 + 1 is 1e8: what is added to what first decides whether the 1s are seen."""
    step = Step(step_index=2, timestep=0.0, latent_coef=1.0, output_coefs=(1.0, 1.0))
    x, first, second = np.float32([[1e8]]), np.float32([[4.0]]), np.float32([[4.0]])
    assert update_latents(step, x, [first, second]) == np.float32(1e8)
    assert update_latents(step, x, [first, second], outputs_first=True) == np.float32(1e8 + 8)


@given(steps(), st.integers(0, 5))
def test_a_late_request_lets_its_oldest_output_stand_in(step, seed):
    x, newest = arrays(seed, 1)
    plain = step.model_copy(update={"slopes": None})
    if step.means is not None and step.slopes is not None:
        plain = plain.model_copy(
            update={"means": step.means.model_copy(update={"latent_slope": 0.0, "output_slopes": ()})}
        )
    expected = update_latents(plain, x, [newest] * max(len(step.output_coefs), 1))
    np.testing.assert_allclose(update_latents(step, x, [newest]), expected, rtol=1e-4, atol=1e-4)


@given(st.lists(numbers, min_size=1, max_size=5), st.integers(0, 5))
def test_a_weighted_sum_is_linear_and_new(coefs, seed):
    terms = arrays(seed, len(coefs) - 1)
    kept = [term.copy() for term in terms]
    found = weighted_sum(coefs, terms)
    np.testing.assert_allclose(found, np.einsum("k,k...->...", coefs, np.stack(terms)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(weighted_sum(coefs, np.stack(terms)), found)
    assert all(np.array_equal(term, copy) for term, copy in zip(terms, kept, strict=True))


def test_a_weighted_sum_needs_a_coefficient_for_each_term():
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([1.0], arrays(0, 1))


@pytest.mark.parametrize(("shape", "axes"), [((2, 5, 3), (1,)), ((2, 3, 4, 5), (2, 3)), ((2, 3, 2, 4, 5), (3, 4))])
def test_means_are_over_positions(shape, axes):
    (value,) = arrays(0, 0, shape)
    found = mean_over_positions(value)
    np.testing.assert_allclose(found, value.astype(float).mean(axis=axes, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean_over_positions(torch.from_numpy(value)).numpy(), found, rtol=1e-5, atol=1e-6)


def test_outputs_that_stay_the_same_or_vanish_have_a_place():
    slopes = Slopes(centre=0.0, spread=1.0, latent_coef=0.0, output_coefs=(0.0, 0.0))
    ones, zeros = np.ones((1, 3, 4), np.float32), np.zeros((1, 3, 4), np.float32)
    for before, output, place in (
        (ones, ones, -FARTHEST),
        (ones, zeros, FARTHEST),
        (zeros, zeros, 0.0),
        (zeros, ones, 0.0),
    ):
        assert place_among_samples(slopes, log_change(before, output)) == [place]
        assert place_among_samples(slopes, log_change(torch.tensor(before), torch.tensor(output))) == place


@given(st.integers(1, 5))
def test_a_sample_has_the_same_place_in_any_batch(samples):
    before, output = arrays(samples, 1, (samples, 7, 5))
    together = log_change(before, output)
    alone = [log_change(before[i : i + 1], output[i : i + 1])[0] for i in range(samples)]
    np.testing.assert_array_equal(together, alone)


@st.composite
def packings(draw):
    split = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return split, draw(st.permutations(range(len(split))))


@given(packings(), st.integers(1, 3))
def test_noise_comes_back_from_latents(packing, samples):
    split, permutation = packing
    noise = np.arange(samples * math.prod(split)).reshape(samples, -1)
    latents = latents_from_noise(noise, split, permutation)
    assert latents.shape == (samples, *(split[axis] for axis in permutation))
    np.testing.assert_array_equal(noise_from_latents(latents, split, tuple(permutation)), noise)
    tensor = latents_from_noise(torch.from_numpy(noise), split, permutation)
    np.testing.assert_array_equal(tensor.numpy(), latents)
    np.testing.assert_array_equal(noise_from_latents(tensor, split, tuple(permutation)).numpy(), noise)
