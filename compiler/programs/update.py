"""A step's update of the latents in torch: the rule is `otcache.schemas.arithmetic`, in float32 whatever comes in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from otcache.schemas import arithmetic
from otcache.schemas.program import Step


def apply_step(step: Step, latents: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """The latents after a step, float32 (n, …), from those before it and the guided outputs so far (n, …), newest last.

    See `arithmetic.update_latents`, also for outputs that are missing.
    """
    recent = outputs[max(len(outputs) - max(len(step.output_coefs), 2), 0) :]
    result: Tensor = arithmetic.update_latents(step, latents.float(), [output.float() for output in recent])
    return result


def mean(value: Tensor) -> Tensor:
    """Over positions, which stay as axes of size 1: float32."""
    result: Tensor = arithmetic.mean_over_positions(value.float())
    return result


def log_change(before: Tensor, output: Tensor) -> Tensor:
    """ln(‖v − v_before‖ / ‖v‖) of each sample, float32 (n,): `arithmetic.log_change`."""
    result: Tensor = arithmetic.log_change(before.float(), output.float())
    return result
