"""A step's coefficients in torch: numbers, or for each sample its own where the step has slopes (`Slopes`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from otcache.schemas.program import FARTHEST, TINY, Slopes, Step


def coefficients(step: Step, outputs: Sequence[Tensor]) -> list[float | Tensor]:
    """Coefficients of the latents and then of the outputs that the step weighs, newest last.

    Args:
        outputs: the guided outputs so far (n, …), newest last. With fewer than two, slopes are left out.

    Returns numbers, or float32 (n, 1, …) that broadcast over the outputs.
    """
    coefs: list[float | Tensor] = [step.latent_coef, *step.output_coefs]
    if step.slopes is None or len(outputs) < 2:
        return coefs
    place = place_among_samples(step.slopes, log_change(outputs[-2], outputs[-1]))
    place = place.reshape(-1, *[1] * (outputs[-1].ndim - 1))
    slopes = (step.slopes.latent_coef, *step.slopes.output_coefs)
    return [coef + slope * place for coef, slope in zip(coefs, slopes, strict=True)]


def log_change(before: Tensor, output: Tensor) -> Tensor:
    """ln(‖v − v_before‖ / ‖v‖) of each sample, float32 (n,); squares below 1e-30 count as that."""
    moved, size = (
        part.float().flatten(1).square().sum(dim=1).clamp_min(TINY).log() for part in (output - before, output)
    )
    return 0.5 * (moved - size)


def place_among_samples(slopes: Slopes, change: Tensor) -> Tensor:
    """(n,): how many spreads from the calibrated samples' centre, at most `FARTHEST`."""
    return ((change - slopes.centre) / slopes.spread).clamp(-FARTHEST, FARTHEST)
