"""The sampling loop: executes a `Program` over a `Model`. No solver lives here, only the program's coefficients.

Shapes: n samples, g branches of guidance stacked on the batch (negative first). Latents x and guided outputs v are
float32 (n, *latents.shape) on the host; features and residuals r have the batch g·n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.program import FARTHEST, TINY, Program, Slopes, Step, position_axes

Float32 = NDArray[np.float32]
Residual = tuple[Float32, ...]
"""Result − source of every feature."""
Callback = Callable[[int, int], None]
"""Called with the number of finished steps and of all; what it raises ends the run."""
Coefs = list[Float32 | float]
"""Of the latents and then of outputs, newest last: numbers, or arrays that broadcast over latents."""
T = TypeVar("T")


class Model(Protocol):
    """The denoiser in three parts, with the conditioning already in place."""

    def embed(self, x: Float32, timestep: float) -> None:
        """x: float32 (n, …); timestep in the model's units. Fills what blocks and head read."""

    def blocks(self) -> None:
        """Turn every feature's source into its result."""

    def residual(self) -> Residual:
        """Result − source of every feature after `blocks`; new arrays."""

    def apply(self, residual: Residual) -> None:
        """Set every feature's result to source + residual, instead of `blocks`."""

    def head(self) -> Float32:
        """The output of every branch, float32 (g, n, …)."""


def sample(
    model: Model,
    program: Program,
    latents: Float32,
    *,
    guidance_weights: Sequence[float],
    keep_norm: bool = False,
    timestep_scale: float = 1.0,
    callback: Callback | None = None,
) -> Float32:
    """Run the program from the initial latents, float32 (n, …), to the final ones.

    r = blocks(h) − h  if step.compute else  Σ c_m r_m          v = Σ_g weight_g · head(h + r)_g
    x ← latent_coef · x + Σ_m output_coefs_m · v_m              both histories newest last; see `Slopes` for
    coefficients that
                                                                follow the sample, and `Means` for what is added to
                                                                whole channels
    keep_norm: v is multiplied so that its vectors along the last axis are as long as those of the last branch.
    """
    x = latents.astype(np.float32)
    outputs: list[Float32] = []
    residuals: list[Residual] = []
    for index, step in enumerate(program.steps):
        model.embed(np.float32(step.input_scale) * x, step.timestep * timestep_scale)
        if step.compute:
            model.blocks()
            if program.residual_memory:
                residuals = newest([*residuals, model.residual()], program.residual_memory)
        else:
            recent = newest(residuals, len(step.residual_coefs))
            model.apply(tuple(combination(step.residual_coefs, list(parts)) for parts in zip(*recent, strict=True)))
        outputs = newest([*outputs, guided(model.head(), guidance_weights, keep_norm)], program.output_memory)
        x = updated(step, x, newest(outputs, len(step.output_coefs)))
        if callback is not None:
            callback(index + 1, len(program.steps))
    return x


def updated(step: Step, x: Float32, outputs: list[Float32]) -> Float32:
    """The latents (n, …) after a step, from those before it and the outputs that it weighs, newest last; a new array."""
    coefs: Coefs = [step.latent_coef, *step.output_coefs]
    means: Coefs = [] if step.means is None else [step.means.latent_coef, *step.means.output_coefs]
    if step.slopes is not None:
        place = place_among_samples(step.slopes, outputs[-2], outputs[-1]).reshape(-1, *[1] * (x.ndim - 1))
        coefs = following(coefs, [step.slopes.latent_coef, *step.slopes.output_coefs], place)
        if step.means is not None:
            means = following(means, [step.means.latent_slope, *step.means.output_slopes], place)
    total = weighed(coefs, x, outputs)
    if means:
        total += weighed(means, x, outputs).mean(axis=position_axes(x.ndim), keepdims=True, dtype=np.float32)
    return total


def weighed(coefs: Coefs, x: Float32, outputs: list[Float32]) -> Float32:
    """coefs₀ · x + Σ coefs_{m+1} · v_m; a new array."""
    total = np.float32(coefs[0]) * x
    if outputs:
        total += combination(coefs[1:], outputs)
    return total


def following(coefs: Coefs, slopes: Sequence[float], place: Float32) -> Coefs:
    """Each sample's coefficients, from its place among the samples (n, 1, …)."""
    return [np.float32(coef) + np.float32(slope) * place for coef, slope in zip(coefs, slopes, strict=True)]


def place_among_samples(slopes: Slopes, before: Float32, output: Float32) -> Float32:
    """(n,): how many spreads more or less than calibration's samples the guided output (n, …) of each sample has
    changed.

    clip((ln(‖v − v_before‖ / ‖v‖) − centre) / spread, ±FARTHEST), in float32; squares below 1e-30 count as that.
    """
    moved, size = (
        np.log(np.maximum(np.square(part.reshape(len(part), -1)).sum(axis=1), np.float32(TINY)))
        for part in (output - before, output)
    )
    place = (np.float32(0.5) * (moved - size) - np.float32(slopes.centre)) / np.float32(slopes.spread)
    return np.clip(place, np.float32(-FARTHEST), np.float32(FARTHEST))


def guided(branches: Float32, weights: Sequence[float], keep_norm: bool) -> Float32:
    """The branches' outputs float32 (g, n, …) as one (n, …)."""
    output = combination(weights, branches)
    if keep_norm:
        length = np.linalg.norm(output, axis=-1, keepdims=True)
        output *= np.linalg.norm(branches[-1], axis=-1, keepdims=True) / np.maximum(length, np.float32(TINY))
    return output


def combination(coefs: Sequence[Float32 | float], arrays: Sequence[Float32] | Float32) -> Float32:
    """Σ coefs · arrays in float32, added in order; a new array. A coefficient is a number, or an array that broadcasts."""
    total = np.float32(coefs[0]) * arrays[0]
    for coef, array in zip(coefs[1:], arrays[1:], strict=True):
        total += np.float32(coef) * array
    return total


def newest(history: list[T], count: int) -> list[T]:
    """The last `count` entries."""
    return history[max(len(history) - count, 0) :]
