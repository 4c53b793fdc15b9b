"""Inner products of what a step weighs, for one sample: all that a fit needs to know of it.

They are summed in float64 over blocks of a sample's elements, the prior's part subtracted before anything can cancel.
The means over a sample's positions are not written out: the product of two that are spread over P positions is P times
that of the means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcache.schemas.arithmetic import mean_over_positions, weighted_sum
from otcache.schemas.program import position_axes

from .runs import FloatArray

GRAM_ELEMENTS = 1 << 16
"""Elements of a sample whose products are summed at a time."""


def combine(weights: NDArray[np.float32], values: Sequence[Tensor]) -> Tensor:
    """Σ w_r u_r, and where there are twice as many weights as values the means of values after them.

    Args:
        weights: (r,) or (2r,).
        values: latents and outputs of one sample, (1, …) each.
    """
    terms = [*values, *(map(mean_over_positions, values) if len(weights) > len(values) else ())]
    coefs = [float(weight) for weight in weights]
    total: Tensor = weighted_sum(coefs, terms)
    return total


def step_statistics(
    latents: NDArray[np.float32],
    outputs: Sequence[NDArray[np.float32]],
    here: NDArray[np.float32],
    target: NDArray[np.float32],
    prior: FloatArray,
) -> tuple[FloatArray, FloatArray, float, float]:
    """Gram matrix (r, r), products with the remainder (r,), ‖x − X‖ and ‖X‖ of one sample.

    Args:
        latents: x, where the sample is; (…).
        outputs: v, newest last; (…) each.
        here: X_i, where the full run is.
        target: X_j, where the full run goes.
        prior: coefficients (1 + outputs,); the remainder is X_j − Σ prior · u.
    """
    values = np.stack([latents, *outputs]).reshape(1 + len(outputs), -1)
    goal = target.reshape(-1)
    count = len(values)
    gram, cross, distance, size = np.zeros((count, count)), np.zeros(count), 0.0, 0.0
    for start in range(0, values.shape[1], GRAM_ELEMENTS):
        part = slice(start, start + GRAM_ELEMENTS)
        block = values[:, part].astype(np.float64)
        gram += block @ block.T
        cross += block @ (goal[part] - prior @ block)
        reference = here.reshape(-1)[part].astype(np.float64)
        distance += float(np.square(block[0] - reference).sum())
        size += float(np.square(reference).sum())
    axes = tuple(axis - 1 for axis in position_axes(latents.ndim + 1))
    if axes:
        positions = int(np.prod([latents.shape[axis] for axis in axes]))
        means = np.stack([_mean(value, axes) for value in (latents, *outputs)])
        remainder = _mean(target, axes) - prior @ means
        products, leftover = positions * means @ means.T, positions * means @ remainder
        gram = np.block([[gram, products], [products, products]])
        cross = np.concatenate([cross, leftover])
    return gram, cross, float(np.sqrt(distance)), float(np.sqrt(size))


def _mean(value: NDArray[np.float32], axes: tuple[int, ...]) -> FloatArray:
    """Over positions, flattened float64: the float32 mean that a program takes."""
    return mean_over_positions(torch.from_numpy(np.asarray(value))[None])[0].double().numpy().reshape(-1)
