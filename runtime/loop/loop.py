"""The sampling loop: executes a `Program` over a `SplitModel`. No solver lives here, only the program's coefficients.

Shapes: n samples, g branches of guidance stacked on the batch (negative first). Latents x and guided outputs v are
float32 (n, *latents.shape) on the host; features and residuals r have the batch g·n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.arithmetic import update_latents, weighted_sum
from otcache.schemas.program import TINY, Program

Float32 = NDArray[np.float32]
Residual = tuple[Float32, ...]
"""Result − source of every feature."""
Callback = Callable[[int, int], None]
"""Called with the number of finished steps and of all; what it raises ends the run."""
T = TypeVar("T")


class SplitModel(Protocol):
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
    model: SplitModel,
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
        x ← latent_coef · x + Σ_m output_coefs_m · v_m              `update_latents`, which has the whole rule

    Both histories are newest last.

    Args:
        model: the denoiser, with the conditioning of n samples in place.
        program: what the budget runs.
        latents: the initial ones, float32 (n, …), scaled for the sampler.
        guidance_weights: of the branches, negative first.
        keep_norm: multiply v so that its vectors along the last axis are as long as those of the last branch.
        timestep_scale: from the scheduler's times to the model's.
        callback: see `Callback`.
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
            model.apply(tuple(weighted_sum(step.residual_coefs, list(parts)) for parts in zip(*recent, strict=True)))
        outputs = newest([*outputs, guide(model.head(), guidance_weights, keep_norm)], program.output_memory)
        x = update_latents(step, x, newest(outputs, len(step.output_coefs)), outputs_first=True)
        if callback is not None:
            callback(index + 1, len(program.steps))
    return x


def guide(branches: Float32, weights: Sequence[float], keep_norm: bool) -> Float32:
    """The branches' outputs float32 (g, n, …) as one (n, …): Σ weights · branches.

    >>> guide(np.float32([[[1.0, 0.0]], [[3.0, 4.0]]]), (-1.0, 2.0), keep_norm=False)
    array([[5., 8.]], dtype=float32)

    keep_norm: multiply it so that its vectors along the last axis are as long as those of the last branch.
    """
    output: Float32 = weighted_sum(weights, branches)
    if keep_norm:
        length = np.linalg.norm(output, axis=-1, keepdims=True)
        output *= np.linalg.norm(branches[-1], axis=-1, keepdims=True) / np.maximum(length, np.float32(TINY))
    return output


def newest(history: list[T], count: int) -> list[T]:
    """The last `count` entries.

    >>> newest([1, 2, 3], 2), newest([1], 2), newest([1, 2, 3], 0)
    ([2, 3], [1], [])
    """
    return history[max(len(history) - count, 0) :]
