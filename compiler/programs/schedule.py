"""Schedules: increasing step indices, the first 0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from otcache.schemas.errors import UsageError


def uniform_schedule(budget: int, num_inference_steps: int) -> tuple[int, ...]:
    """`budget` step indices that divide the timeline evenly: round(k · T / B), the first 0.

    >>> uniform_schedule(4, 10)
    (0, 3, 5, 8)
    """
    if not 1 <= budget <= num_inference_steps:
        raise UsageError(f"budget {budget}: expected 1 … {num_inference_steps}, the steps of the full sampler")
    return tuple((2 * k * num_inference_steps + budget) // (2 * budget) for k in range(budget))


def check_schedule(schedule: Sequence[int], num_inference_steps: int) -> tuple[int, ...]:
    """The schedule as integers, or UsageError: indices must increase from 0 and stay below T."""
    indices = tuple(int(step_index) for step_index in schedule)
    increasing = all(before < after for before, after in itertools.pairwise(indices))
    if not indices or indices[0] != 0 or not increasing or indices[-1] >= num_inference_steps:
        raise UsageError(
            f"schedule {list(indices)}: expected step indices that start at 0, increase strictly and stay below "
            f"{num_inference_steps}, the number of steps"
        )
    return indices
