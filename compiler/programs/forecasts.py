"""Polynomials through computed values: the weights with which they forecast the next ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def forecast_coefs(computed: Sequence[int], step_index: int, order: int) -> tuple[float, ...]:
    """Weights of the last `order` + 1 computed values in their polynomial at `step_index`, newest last.

    Order 0 reuses the newest value; order k is exact for polynomials of degree k in the step index (TaylorSeer,
    arXiv 2503.06923, in Lagrange's form). Fewer values give a lower order.
    """
    nodes = [float(node) for node in computed[-(order + 1) :]]
    weights = []
    for i, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != i]
        weights.append(float(np.prod([(step_index - other) / (node - other) for other in others])))
    return tuple(weights)
