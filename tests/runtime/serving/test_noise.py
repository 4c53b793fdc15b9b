"""Noise against torch, bit for bit (AVX2 hosts) or to the last places."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.runtime.serving.noise import SEED_MAXIMUM, SEED_MINIMUM, noise, standard_normal

EXACT = torch.backends.cpu.get_cpu_capability() == "AVX2"
seeds = st.integers(SEED_MINIMUM, SEED_MAXIMUM)


def torch_normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def check(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    if EXACT:
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


@settings(max_examples=150, deadline=None)
@given(size=st.one_of(st.integers(0, 70), st.integers(71, 5000)), seed=seeds)
def test_sizes_and_seeds(size, seed):
    check(standard_normal((size,), seed), torch_normal((size,), seed))


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**32, 2**32 + 5, 2**63, 2**64 - 1])
def test_large_and_negative_seeds(seed):
    check(standard_normal((2, 3, 5, 7), seed), torch_normal((2, 3, 5, 7), seed))


def test_a_million():
    check(standard_normal((1 << 20,), 11), torch_normal((1 << 20,), 11))


def test_one_generator_or_one_for_each():
    together = torch_normal((3, 4, 5), 9)
    check(noise((4, 5), 9, 3), together)
    check(noise((4, 5), [9, 1], 2), np.concatenate([torch_normal((1, 4, 5), seed) for seed in (9, 1)]))
