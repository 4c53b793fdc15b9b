"""Polynomials through computed values: the weights with which they forecast the next ones."""

from __future__ import annotations

import math
from collections.abc import Sequence


def lagrange_weights(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights of the values at distinct nodes in the polynomial through them, at another place.

        w_k = Π_{j≠k} (at − node_j) / (node_k − node_j)

    They sum to 1 and are exact for polynomials of a degree below the number of nodes.

    >>> lagrange_weights([0.0, 1.0], 3.0)
    (-2.0, 3.0)
    """
    return tuple(
        math.prod((float(at - other) / float(node - other) for j, other in enumerate(nodes) if j != k), start=1.0)
        for k, node in enumerate(nodes)
    )


def forecast_coefs(computed: Sequence[int], step_index: int, order: int) -> tuple[float, ...]:
    """Weights of the last `order` + 1 computed values in their polynomial at `step_index`, newest last.

    Order 0 reuses the newest value; order k is exact for polynomials of degree k in the step index (TaylorSeer,
    arXiv 2503.06923, in Lagrange's form). Fewer values give a lower order.

    >>> forecast_coefs([0, 4, 6], 7, order=0)
    (1.0,)
    >>> forecast_coefs([0, 4, 6], 7, order=1)
    (-0.5, 1.5)
    >>> coefs = forecast_coefs([0, 2, 4], 5, order=2)
    >>> round(sum(coef * node**2 for coef, node in zip(coefs, [0, 2, 4])), 9)
    25.0
    """
    return lagrange_weights([float(node) for node in computed[-(order + 1) :]], step_index)
