"""Inner products along full runs: all that the graph needs to know of a model.

For a deterministic sampler the error of any open-loop jump is a quadratic form in latents and outputs, so their Gram
matrix replaces model evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectoryStatistics:
    """Mean inner products of latents X_0 … X_T and outputs V_0 … V_{T−1}, per element and sample."""

    gram: FloatArray
    """float64 (2T+1, 2T+1), rows and columns in the order X_0 … X_T, V_0 … V_{T−1}."""

    @property
    def num_inference_steps(self) -> int:
        return (self.gram.shape[0] - 1) // 2

    def latent(self, index: int) -> int:
        """Row of X_index."""
        return index

    def output(self, index: int) -> int:
        """Row of V_index."""
        return self.num_inference_steps + 1 + index


def statistics_from_trajectory(latents: ArrayLike, outputs: ArrayLike) -> TrajectoryStatistics:
    """Statistics of full runs: latents float (T+1, n, …), outputs float (T, n, …). Raises ValueError on other shapes."""
    x, v = np.asarray(latents), np.asarray(outputs)
    if x.shape[0] != v.shape[0] + 1 or x.shape[1:] != v.shape[1:]:
        raise ValueError(f"latents {x.shape} and outputs {v.shape}: expected (T+1, n, …) and (T, n, …)")
    gram = np.zeros((x.shape[0] + v.shape[0],) * 2)
    for sample in range(x.shape[1]):
        rows = np.concatenate([x[:, sample].reshape(len(x), -1), v[:, sample].reshape(len(v), -1)]).astype(np.float64)
        gram += rows @ rows.T
    return TrajectoryStatistics(gram=gram / (x[0].size))
