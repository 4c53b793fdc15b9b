"""Inner products of a step against regressors that are written out."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration import step_statistics as module
from otcache.compiler.calibration.step_statistics import combine, step_statistics
from otcache.schemas.program import position_axes

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
)
"""Of a sample: vectors, tokens × channels, channels × height × width, channels × frames × height × width."""
ROUNDING = 1e-6
"""Of the float32 means, relative to the size of what is multiplied."""


def regressors_of(values, shape):
    """(r or 2r, d): values, and after them their means where a sample has positions, written out; float64."""
    axes = tuple(axis - 1 for axis in position_axes(1 + len(shape)))
    rows = [value.astype(np.float64) for value in values]
    if axes:
        rows += [np.broadcast_to(value.mean(axis=axes, keepdims=True), shape) for value in rows]
    return np.stack(rows).reshape(len(rows), -1)


@given(SHAPES, st.integers(1, 4), st.integers(0, 999), st.sampled_from([1, 3, 7, 1 << 16]))
def test_inner_products_are_those_of_written_out_regressors(shape, outputs, seed, block):
    random = np.random.default_rng(seed)
    latents, here, target, *outs = random.normal(size=(3 + outputs, *shape)).astype(np.float32)
    prior = random.normal(size=1 + outputs)
    with patch.object(module, "GRAM_ELEMENTS", block):
        gram, cross, distance, size = step_statistics(latents, outs, here, target, prior)
    rows = regressors_of([latents, *outs], shape)
    remainder = target.astype(np.float64).ravel() - prior @ rows[: len(prior)]
    norms = np.linalg.norm(rows[: len(prior)], axis=1)
    scale = np.tile(norms, len(rows) // len(prior))
    assert gram.shape == (len(rows), len(rows)) and gram.dtype == cross.dtype == np.float64
    assert np.all(np.abs(gram - rows @ rows.T) <= ROUNDING * np.outer(scale, scale))
    assert np.all(
        np.abs(cross - rows @ remainder) <= ROUNDING * scale * (np.abs(prior) @ norms + np.linalg.norm(target))
    )
    plain = slice(len(prior))  # no means, no rounding
    assert gram[plain, plain] == pytest.approx(rows[plain] @ rows[plain].T, rel=1e-12, abs=1e-12)
    assert cross[plain] == pytest.approx(rows[plain] @ remainder, rel=1e-12, abs=1e-12 * np.prod(shape))
    assert distance == pytest.approx(np.linalg.norm(latents.astype(np.float64) - here))
    assert size == pytest.approx(np.linalg.norm(here.astype(np.float64)))


@given(SHAPES, st.integers(1, 3), st.integers(0, 999))
def test_least_squares_from_inner_products_is_that_of_the_regressors(shape, outputs, seed):
    """Of several samples at once, with the prior's part taken off before: fitted values agree where coefficients of
    parallel regressors may not.
    """
    random = np.random.default_rng(seed)
    prior = random.normal(size=1 + outputs)
    gram, cross, matrix, goal = 0.0, 0.0, [], []
    for _ in range(4):
        latents, target, *outs = random.normal(size=(2 + outputs, *shape)).astype(np.float32)
        found = step_statistics(latents, outs, latents, target, prior)
        gram, cross = gram + found[0], cross + found[1]
        rows = regressors_of([latents, *outs], shape)
        matrix.append(rows.T)
        goal.append(target.astype(np.float64).ravel() - prior @ rows[: len(prior)])
    stacked, wanted = np.concatenate(matrix), np.concatenate(goal)
    found = stacked @ np.linalg.lstsq(gram, cross, rcond=1e-6)[0]
    expected = stacked @ np.linalg.lstsq(stacked, wanted, rcond=1e-4)[0]
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(wanted)


def test_where_latents_are_the_full_runs_there_is_no_distance():
    latents = np.ones((4, 3), np.float32)
    _, _, distance, size = step_statistics(latents, [latents], latents, latents, np.array([1.0, 0.0]))
    assert distance == 0.0 and size == pytest.approx(np.sqrt(12))


@given(SHAPES, st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_a_combination_is_the_sum_of_the_regressors(shape, outputs, seed, with_means):
    random = np.random.default_rng(seed)
    values = random.normal(size=(1 + outputs, *shape)).astype(np.float32)
    rows = regressors_of(values, shape)
    with_means = with_means and len(rows) > len(values)
    weights = random.normal(size=len(rows) if with_means else len(values)).astype(np.float32)
    found = combine(weights, [torch.from_numpy(value)[None] for value in values])
    expected = weights.astype(np.float64) @ rows[: len(weights)]
    assert found.dtype == torch.float32 and found.shape == (1, *shape)
    assert found.numpy().ravel() == pytest.approx(expected, abs=1e-5)
