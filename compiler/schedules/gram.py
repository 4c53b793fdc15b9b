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


def statistics_from_grams(grams: ArrayLike, elements: int) -> TrajectoryStatistics:
    """Statistics of n full runs from their inner products (n, 2T+1, 2T+1), of so many elements a sample.

    Raises ValueError on other shapes.

    >>> statistics_from_grams(np.ones((2, 3, 3)), elements=4).gram[0]
    array([0.25, 0.25, 0.25])
    """
    values = np.asarray(grams, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] != values.shape[2] or values.shape[1] % 2 == 0:
        raise ValueError(f"inner products have shape {values.shape}: expected (n, 2T+1, 2T+1)")
    return TrajectoryStatistics(gram=values.sum(axis=0) / (len(values) * elements))
