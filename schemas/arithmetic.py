"""The arithmetic of a program's steps, written once for every kind of array: the runtime does it in numpy, the compiler
in torch.

Arrays are numpy's or torch's; nothing here imports either (`array_api_compat` finds the library of what it is given).
Shapes: n samples, latents x and guided outputs v (n, …), all float32 on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace

from .program import FARTHEST, TINY, Slopes, Step, position_axes

Array = Any
"""An array of numpy or a tensor of torch."""
Coefs = list[Any]
"""Numbers, or arrays (n, 1, …) with one for each sample."""


def update_latents(step: Step, latents: Array, outputs: Sequence[Array], *, outputs_first: bool = False) -> Array:
    """The latents after a step; a new array of their type.

        x ← latent_coef · x + Σ_m output_coefs_m · v_m + m(the same with the coefficients of `means`)

    with m the mean over positions. Coefficients follow each sample where the step has slopes (`Slopes`).

    >>> import numpy as np
    >>> step = Step(step_index=1, timestep=0.5, latent_coef=1.0, output_coefs=(-0.5, 2.0))
    >>> update_latents(step, np.float32([[1.0]]), [np.float32([[10.0]]), np.float32([[4.0]]), np.float32([[3.0]])])
    array([[5.]], dtype=float32)

    Args:
        step: a step of a program.
        latents: float32 (n, …), those before the step.
        outputs: the guided outputs so far, each float32 (n, …), newest last; at least one if the step weighs any. Where
            a request started late and some are missing, the oldest there is stands in for those before it; with fewer
            than two, slopes are left out.
        outputs_first: add the outputs to one another before the latents, as engines on a device do, rather than one
            after the other to the latents. The two differ in the last bit, and both are kept: what the runtime serves
            and what the compiler writes down stay the same from release to release.
    """
    coefs: Coefs = [step.latent_coef, *step.output_coefs]
    means: Coefs = [] if step.means is None else [step.means.latent_coef, *step.means.output_coefs]
    if step.slopes is not None and len(outputs) > 1:
        place = place_among_samples(step.slopes, log_change(outputs[-2], outputs[-1]))
        place = place.reshape(-1, *[1] * (latents.ndim - 1))
        coefs = _follow(coefs, [step.slopes.latent_coef, *step.slopes.output_coefs], place)
        if step.means is not None:
            means = _follow(means, [step.means.latent_slope, *step.means.output_slopes], place)
    total = _weigh(coefs, latents, outputs, outputs_first)
    if means:
        total += mean_over_positions(_weigh(means, latents, outputs, outputs_first))
    return total


def weighted_sum(coefs: Sequence[Any], arrays: Sequence[Array] | Array) -> Array:
    """Σ coefs · arrays, added in their order; a new array. At least one term.

    >>> import numpy as np
    >>> weighted_sum([2.0, -1.0], np.float32([[1, 2], [3, 4]]))
    array([-1.,  0.], dtype=float32)

    Args:
        coefs: as many as there are arrays: numbers, or arrays that broadcast over them.
        arrays: of one shape; a sequence of them, or one array that holds them along its first axis.
    """
    total = coefs[0] * arrays[0]
    for coef, array in zip(coefs[1:], arrays[1:], strict=True):
        total += coef * array
    return total


def mean_over_positions(array: Array) -> Array:
    """The mean of (n, …) over positions (`position_axes`), which stay as axes of size 1.

    >>> import numpy as np
    >>> mean_over_positions(np.float32([[[1, 10], [3, 20]]]))  # one sample of two tokens with two channels
    array([[[ 2., 15.]]], dtype=float32)
    """
    return array.mean(axis=position_axes(array.ndim), keepdims=True)


def log_change(before: Array, output: Array) -> Array:
    """ln(‖v − v_before‖ / ‖v‖) of each sample, (n,), from outputs (n, …); squares below 1e-30 count as that.

    >>> import numpy as np
    >>> np.exp(log_change(np.float32([[3, 0]]), np.float32([[3, 4]]))).round(6)
    array([0.8], dtype=float32)
    """
    moved, size = (_log_square(part) for part in (output - before, output))
    return 0.5 * (moved - size)


def place_among_samples(slopes: Slopes, change: Array) -> Array:
    """(n,): how many spreads a `log_change` is from the centre of the calibrated samples, at most `FARTHEST`.

    >>> import numpy as np
    >>> slopes = Slopes(centre=-1.0, spread=0.5, latent_coef=0.0, output_coefs=(0.0, 0.0))
    >>> place_among_samples(slopes, np.float32([-1.0, -0.5, 9.0]))
    array([0. , 1. , 2.5], dtype=float32)
    """
    return ((change - slopes.centre) / slopes.spread).clip(-FARTHEST, FARTHEST)


def latents_from_noise(noise: Array, split: Sequence[int], permutation: Sequence[int]) -> Array:
    """Noise (n, …) in the order in which a pipeline packs it: its axes split, then permuted, (n, *permuted split).

    >>> import numpy as np
    >>> noise = np.arange(6).reshape(1, 2, 3)  # two channels of three positions
    >>> latents_from_noise(noise, split=(2, 3), permutation=(1, 0)).tolist()  # three positions of two channels
    [[[0, 3], [1, 4], [2, 5]]]

    Args:
        noise: (n, …) as drawn.
        split: the sizes that a sample's noise is reshaped to first.
        permutation: their order in the latents.
    """
    apart = noise.reshape(-1, *split)
    return array_namespace(noise).permute_dims(apart, (0, *(axis + 1 for axis in permutation)))


def noise_from_latents(latents: Array, split: Sequence[int], permutation: Sequence[int]) -> Array:
    """Latents (n, …) back in the order in which their noise was drawn, (n, elements): undoes `latents_from_noise`.

    >>> import numpy as np
    >>> noise_from_latents(np.array([[[0, 3], [1, 4], [2, 5]]]), split=(2, 3), permutation=(1, 0)).tolist()
    [[0, 1, 2, 3, 4, 5]]
    """
    packed = latents.reshape(-1, *(split[axis] for axis in permutation))
    inverse = [permutation.index(axis) + 1 for axis in range(len(permutation))]
    return array_namespace(latents).permute_dims(packed, (0, *inverse)).reshape(len(latents), -1)


def _follow(coefs: Coefs, slopes: Sequence[float], place: Array) -> Coefs:
    """Each sample's coefficients, (n, 1, …), from its place among the samples."""
    return [coef + slope * place for coef, slope in zip(coefs, slopes, strict=True)]


def _weigh(coefs: Coefs, latents: Array, outputs: Sequence[Array], outputs_first: bool) -> Array:
    """coefs₀ · latents + Σ coefs_{m+1} · v_m, with the coefficients of missing outputs given to the oldest there is."""
    latent_coef, *output_coefs = coefs
    missing = max(len(output_coefs) - len(outputs), 0)
    if missing:
        output_coefs = [sum(output_coefs[: missing + 1]), *output_coefs[missing + 1 :]]
    recent = list(outputs[len(outputs) - len(output_coefs) :])
    if not outputs_first or not recent:
        return weighted_sum([latent_coef, *output_coefs], [latents, *recent])
    total = latent_coef * latents
    total += weighted_sum(output_coefs, recent)
    return total


def _log_square(array: Array) -> Array:
    """The logarithm of the sum of squares of each sample, (n,)."""
    flat = array.reshape(len(array), -1)
    return array_namespace(array).log((flat * flat).sum(axis=1).clip(TINY))
