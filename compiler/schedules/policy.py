"""Policies: schedules without their budget, as probability measures on the timeline [0, 1].

A schedule t_0 = 0 < … < t_{B−1} < T becomes the quantile function Q with Q(k/B) = t_k/T, Q(1) = 1, linear in between.
In one dimension quantile functions embed the Wasserstein space W_2 isometrically, so the geodesic between two policies
is (1 − α) Q_0 + α Q_1 (McCann's displacement interpolation). Used by OTCache, arXiv 2606.31026.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ot
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
QUANTILE_CELLS = 8192
"""Cells of equal mass on which POT sees a policy; W_p of two policies is exact to about 1e-7 of the timeline."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A quantile function, linear between knots."""

    levels: FloatArray
    """Increasing, from 0 to 1; float64 (k,)."""
    positions: FloatArray
    """Non-decreasing places on the timeline in [0, 1], from 0 to 1; float64 (k,)."""

    def quantile(self, levels: ArrayLike) -> FloatArray:
        """Q(u) for levels u in [0, 1], of the same shape."""
        return np.interp(np.asarray(levels, dtype=np.float64), self.levels, self.positions)


def policy_from_schedule(schedule: Sequence[int], num_inference_steps: int) -> Policy:
    """The measure of a schedule, which starts at 0, increases strictly and stays below T. Raises ValueError."""
    steps = np.asarray(schedule, dtype=np.int64)
    if (
        steps.ndim != 1
        or not len(steps)
        or steps[0] != 0
        or np.any(np.diff(steps) <= 0)
        or steps[-1] >= num_inference_steps
    ):
        raise ValueError(
            f"schedule {list(schedule)}: expected increasing steps from 0, all below {num_inference_steps}"
        )
    return Policy(
        levels=np.arange(len(steps) + 1) / len(steps),
        positions=np.append(steps, num_inference_steps) / num_inference_steps,
    )


def full_policy() -> Policy:
    """The policy of taking every step: uniform on the timeline."""
    return Policy(levels=np.array([0.0, 1.0]), positions=np.array([0.0, 1.0]))


def displacement_interpolation(start: Policy, end: Policy, alpha: float) -> Policy:
    """Q_α = (1 − α) Q_start + α Q_end, exact on the union of their knots; α in [0, 1]. Raises ValueError outside."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}: expected 0 (the start) … 1 (the end)")
    levels = np.union1d(start.levels, end.levels)
    return Policy(levels=levels, positions=(1 - alpha) * start.quantile(levels) + alpha * end.quantile(levels))


def wasserstein_distance(first: Policy, second: Policy, order: int = 2) -> float:
    """W_p of two policies on the timeline [0, 1], through POT on `QUANTILE_CELLS` cells of equal mass."""
    levels = (np.arange(QUANTILE_CELLS) + 0.5) / QUANTILE_CELLS
    cost = ot.wasserstein_1d(first.quantile(levels), second.quantile(levels), p=order)
    return float(np.asarray(cost).item() ** (1 / order))


def transport_plan(first: Sequence[int], second: Sequence[int], num_inference_steps: int) -> FloatArray:
    """Optimal transport of one schedule's steps onto another's, each step of equal mass: float64 (B_1, B_2), through
    POT.
    """
    source = np.asarray(first, dtype=np.float64) / num_inference_steps
    target = np.asarray(second, dtype=np.float64) / num_inference_steps
    return np.asarray(ot.emd_1d(source, target, metric="sqeuclidean"), dtype=np.float64)


def schedule_from_policy(policy: Policy, budget: int, num_inference_steps: int) -> tuple[int, ...]:
    """Exactly `budget` steps: Q(k/B)·T rounded, then repaired to increase strictly from 0 and stay below T.

    Steps that fall together are moved up, each as little as it must; those that no longer fit below T are moved down.

    Raises ValueError unless 1 ≤ budget ≤ T.
    """
    if not 1 <= budget <= num_inference_steps:
        raise ValueError(f"budget is {budget}: expected 1 … {num_inference_steps}")
    ideal = policy.quantile(np.arange(budget) / budget) * num_inference_steps
    steps = np.floor(ideal + 0.5).astype(np.int64)
    steps[0] = 0
    order = np.arange(budget)
    steps = np.maximum.accumulate(steps - order) + order
    last = num_inference_steps - budget + order
    return tuple(int(step) for step in np.minimum(steps, last))
