"""Gram matrices of full runs against direct sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.calibration.runs import gram_from_rows
from otcache.compiler.schedules.gram import statistics_from_grams


def grams_of(latents, outputs):
    """Inner products (n, 2T+1, 2T+1) of latents (T+1, n, …) and outputs (T, n, …), and elements of a sample."""
    rows = np.concatenate([latents, outputs])
    rows = rows.reshape(*rows.shape[:2], -1)
    return np.einsum("rnd,snd->nrs", rows, rows), rows.shape[2]


@given(st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gram_holds_mean_inner_products_in_the_stated_order(total, samples, shape, seed):
    random = np.random.default_rng(seed)
    latents = random.normal(size=(total + 1, samples, *shape))
    outputs = random.normal(size=(total, samples, *shape))
    statistics = statistics_from_grams(*grams_of(latents, outputs))
    rows = [*latents, *outputs]
    assert statistics.num_inference_steps == total and statistics.gram.dtype == np.float64
    assert np.allclose(statistics.gram, [[np.mean(a * b) for b in rows] for a in rows])
    assert [statistics.latent(total), statistics.output(0)] == [total, total + 1]


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_gram_is_symmetric_and_positive(seed):
    random = np.random.default_rng(seed)
    gram = statistics_from_grams(*grams_of(random.normal(size=(5, 2, 3)), random.normal(size=(4, 2, 3)))).gram
    assert np.allclose(gram, gram.T) and np.linalg.eigvalsh(gram).min() > -1e-12


def test_half_precision_is_summed_in_float64():
    rows = np.full((5, 4096), 200.0, dtype=np.float16)
    gram = statistics_from_grams(gram_from_rows(rows[:3], rows[3:])[None], 4096).gram
    assert gram == pytest.approx(np.full((5, 5), 40_000.0))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 5), (2, 4, 4)])
def test_shapes_that_are_not_of_full_runs_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(n, 2T\+1, 2T\+1\)"):
        statistics_from_grams(np.zeros(shape), 4)
