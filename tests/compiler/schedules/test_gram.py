"""Gram matrices against direct sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.compiler.schedules.gram import statistics_from_trajectory


@given(st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gram_holds_mean_inner_products_in_the_stated_order(total, samples, shape, seed):
    random = np.random.default_rng(seed)
    latents = random.normal(size=(total + 1, samples, *shape))
    outputs = random.normal(size=(total, samples, *shape))
    statistics = statistics_from_trajectory(latents, outputs)
    rows = [*latents, *outputs]
    assert statistics.num_inference_steps == total and statistics.gram.dtype == np.float64
    assert np.allclose(statistics.gram, [[np.mean(a * b) for b in rows] for a in rows])
    assert [statistics.latent(total), statistics.output(0)] == [total, total + 1]


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_gram_is_symmetric_and_positive(seed):
    random = np.random.default_rng(seed)
    gram = statistics_from_trajectory(random.normal(size=(5, 2, 3)), random.normal(size=(4, 2, 3))).gram
    assert np.allclose(gram, gram.T) and np.linalg.eigvalsh(gram).min() > -1e-12


def test_half_precision_is_summed_in_float64():
    latents = np.full((3, 1, 4096), 200.0, dtype=np.float16)
    assert statistics_from_trajectory(latents, latents[:2]).gram == pytest.approx(np.full((5, 5), 40_000.0))


@pytest.mark.parametrize("shapes", [((3, 2, 4), (3, 2, 4)), ((3, 2, 4), (2, 1, 4)), ((3, 2, 4), (2, 2, 5))])
def test_shapes_that_do_not_belong_together_are_refused(shapes):
    with pytest.raises(ValueError, match=r"expected \(T\+1, n, …\) and \(T, n, …\)"):
        statistics_from_trajectory(np.zeros(shapes[0]), np.zeros(shapes[1]))
