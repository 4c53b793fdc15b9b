"""Pass `interpolate`: two policies + budget → Schedule, on the path from the reference to the anchor policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .policy import displacement_interpolation, full_policy, policy_from_schedule, schedule_from_policy

Law = Literal["reciprocal", "linear"]
REACH = 0.4
"""How far candidate weights lie on either side of the law's."""


def interpolation_weight(budget: int, reference_budget: int, anchor_budget: int, law: Law = "reciprocal") -> float:
    """Position on the path: 0 at the reference's budget and above, 1 at the anchor's and below, affine in 1/B or in B.

    Raises ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}: expected 1 or more")
    if anchor_budget >= reference_budget:
        return 0.0 if budget >= reference_budget else 1.0
    if law == "linear":
        weight = (reference_budget - budget) / (reference_budget - anchor_budget)
    else:
        weight = (1 / budget - 1 / reference_budget) / (1 / anchor_budget - 1 / reference_budget)
    return float(min(1.0, max(0.0, weight)))


def candidate_weights(default: float, count: int = 9) -> tuple[float, ...]:
    """`default` and `count` − 1 further weights in [0, 1] around it, increasing."""
    grid = np.linspace(max(0.0, default - REACH), min(1.0, default + REACH), count - 1).tolist()
    return tuple(sorted({round(value, 6) for value in [default, *grid]}))


def interpolated_schedule(
    reference: Sequence[int],
    anchor: Sequence[int],
    budget: int,
    num_inference_steps: int,
    *,
    weight: float | None = None,
) -> tuple[int, ...]:
    """Exactly `budget` steps.

    Up to the reference's budget the policy is the displacement interpolation at `weight` (by default the law in 1/B;
    below the anchor's budget that is the anchor's policy). Above the reference's budget it lies on the path from the
    reference to the full schedule, affine in 1/B, and `weight` has no say.
    """
    start = policy_from_schedule(reference, num_inference_steps)
    if budget > len(reference):
        towards = interpolation_weight(budget, num_inference_steps, len(reference))
        policy = displacement_interpolation(full_policy(), start, towards)
    else:
        weight = interpolation_weight(budget, len(reference), len(anchor)) if weight is None else weight
        policy = displacement_interpolation(start, policy_from_schedule(anchor, num_inference_steps), weight)
    return schedule_from_policy(policy, budget, num_inference_steps)
