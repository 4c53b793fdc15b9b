"""Noise as torch's CPU generator draws it, in numpy: a seed means what it means in diffusers.

Source: ATen/core/MT19937RNGEngine.h (generator), ATen/native/cpu/DistributionTemplates.h (`normal_fill`, AVX2 form),
ATen/native/cpu/avx_mathfun.h (its log, sin and cos, after cephes), ATen/core/DistributionsHelper.h (fewer than 16).

On an AVX2 host the results equal `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` bit for bit in
float32. Torch's other code paths (no AVX2, AVX-512, ARM) use another log and cosine and differ from these, and so from
each other, in the last places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

SEED_MINIMUM, SEED_MAXIMUM = -(1 << 63), (1 << 64) - 1
"""What `torch.Generator.manual_seed` takes."""

_CHUNK = 16
"""Normals come in chunks of 16: eight radii with eight angles give eight cosines, then eight sines."""
_SQRT_HALF = np.float32(0.707106781186547524)
_LOG = tuple(
    map(
        np.float32,
        (
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ),
    )
)
_LOG_2_LOW, _LOG_2_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)
_COS = tuple(map(np.float32, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)))
_SIN = tuple(map(np.float32, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)))
_FOUR_OVER_PI = np.float32(1.27323954473516)
_MINUS_QUARTER_PI = tuple(map(np.float32, (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)))
_TWO_PI = np.float32(2.0 * math.pi)


def standard_normal(shape: Sequence[int], seed: int) -> Float32:
    """float32 normals of `shape`, equal to `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.

    >>> standard_normal((2, 2), seed=0).round(4).tolist() == np.float32([[1.5410, -0.2934], [-2.1788, 0.5684]]).tolist()
    True

    seed: an integer in [−2⁶³, 2⁶⁴), Python's or numpy's; as in torch its lower 32 bits count.
    """
    count = math.prod(shape)
    # A legacy RandomState is seeded by init_genrand, like torch's engine, and its stream is frozen for ever.
    random = np.random.RandomState(int(seed) & 0xFFFFFFFF)
    flat = _normals(random, count) if count >= _CHUNK else _few_normals(random, count)
    return flat.reshape(tuple(shape))


def noise(shape: Sequence[int], seed: int | Sequence[int], count: int) -> Float32:
    """float32 (count, *shape): one seed draws all samples in one go, a list of `count` seeds one sample each.

    This is what diffusers does with one generator and with a list of generators.

    >>> noise((3, 4, 4), seed=7, count=2).shape
    (2, 3, 4, 4)
    >>> bool((noise((3, 4, 4), [7, 7], count=2)[0] == noise((3, 4, 4), [7, 7], count=2)[1]).all())
    True
    """
    if isinstance(seed, Sequence):
        return np.stack([standard_normal((1, *shape), one)[0] for one in seed])
    return standard_normal((count, *shape), seed)


def _normals(random: np.random.RandomState, count: int) -> Float32:
    """`count` ≥ 16 normals; a last chunk that is not full is drawn anew over the last 16 places."""
    rest = count % _CHUNK
    uniforms = _uniforms(random, count)
    result = np.empty(count, np.float32)
    result[: count - rest] = _box_muller(uniforms[: count - rest])
    if rest:
        result[-_CHUNK:] = _box_muller(_uniforms(random, _CHUNK))
    return result


def _words(random: np.random.RandomState, count: int) -> NDArray[np.uint32]:
    return random.randint(0, 1 << 32, size=count, dtype=np.uint32)


def _uniforms(random: np.random.RandomState, count: int) -> Float32:
    """float32 in [0, 1): the lower 24 bits of a word."""
    return (_words(random, count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniforms: Float32) -> Float32:
    """Normals from uniforms, chunk by chunk: √(−2 ln(1 − u₁)) · (cos 2πu₂, sin 2πu₂)."""
    chunks = uniforms.reshape(-1, 2, _CHUNK // 2)
    radius = np.sqrt(np.float32(-2.0) * _log(np.float32(1.0) - chunks[:, 0]))
    sine, cosine = _sin_cos(_TWO_PI * chunks[:, 1])
    normals = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normals + np.float32(0.0)  # torch adds the mean, so that −0 becomes 0


def _few_normals(random: np.random.RandomState, count: int) -> Float32:
    """Fewer than 16 normals: computed one pair at a time in double precision."""
    pairs = (count + 1) // 2
    words = _words(random, 4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
    uniforms = ((words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64((1 << 53) - 1)) * 2.0**-53
    values: list[float] = []
    for first, second in uniforms.tolist():
        radius, theta = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        values += [radius * math.cos(theta), radius * math.sin(theta)]
    return np.array(values[:count], np.float32)


def _fma(a: NDArray[Any], b: NDArray[Any] | np.float32, c: NDArray[Any] | np.float32) -> Float32:
    """a·b + c, rounded once but for a rare halfway case: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * np.float64(b) + np.float64(c)).astype(np.float32)


def _log(x: Float32) -> Float32:
    """Natural logarithm of x in (0, 1], as `log256_ps`."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    e = (exponent - small).astype(np.float32)
    m = np.where(small, mantissa - np.float32(1.0) + mantissa, mantissa - np.float32(1.0))
    square = m * m
    y = np.full_like(m, _LOG[0])
    for coefficient in _LOG[1:]:
        y = _fma(y, m, coefficient)
    y = _fma(y * m, square, e * _LOG_2_LOW) - square * np.float32(0.5)
    return _fma(e, _LOG_2_HIGH, m + y)


def _sin_cos(theta: Float32) -> tuple[Float32, Float32]:
    """Sine and cosine of theta in [0, 2π], as `sincos256_ps`."""
    octant = ((theta * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    turns = octant.astype(np.float32)
    x = theta
    for part in _MINUS_QUARTER_PI:
        x = _fma(turns, part, x)
    square = x * x
    cosine = _fma(_fma(np.full_like(x, _COS[0]), square, _COS[1]), square, _COS[2])
    cosine = _fma(cosine * square, square, square * np.float32(-0.5)) + np.float32(1.0)
    sine = _fma(_fma(np.full_like(x, _SIN[0]), square, _SIN[1]), square, _SIN[2])
    sine = _fma(sine * square, x, x)
    swap = (octant & 2) != 0
    sign_sine = np.where(octant & 4, np.float32(-1.0), np.float32(1.0))
    sign_cosine = np.where((octant - 2) & 4, np.float32(1.0), np.float32(-1.0))
    return np.where(swap, cosine, sine) * sign_sine, np.where(swap, sine, cosine) * sign_cosine
