"""A step's update of the latents in torch: coefficients are numbers, or each sample's own where the step has slopes
(`Slopes`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from otcache.schemas.program import FARTHEST, TINY, Slopes, Step, position_axes

Coefs = list[float | Tensor]
"""Of the latents and then of outputs, newest last: numbers, or float32 (n, 1, …) that broadcast over latents."""


def updated(step: Step, latents: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """x ← latent_coef · x + Σ output_coefs · v, and the same of `means`: float32 (n, …), from the oldest to the newest
    as the runtime adds.

    Args:
        outputs: the guided outputs so far (n, …), newest last. Where a request started late, some are missing: the
            oldest there is stands in for those before it; with fewer than two, slopes are left out.
    """
    coefs: Coefs = [step.latent_coef, *step.output_coefs]
    means: Coefs = [] if step.means is None else [step.means.latent_coef, *step.means.output_coefs]
    if step.slopes is not None and len(outputs) > 1:
        place = place_among_samples(step.slopes, log_change(outputs[-2], outputs[-1]))
        place = place.reshape(-1, *[1] * (latents.ndim - 1))
        coefs = _following(coefs, [step.slopes.latent_coef, *step.slopes.output_coefs], place)
        if step.means is not None:
            means = _following(means, [step.means.latent_slope, *step.means.output_slopes], place)
    result = _weighed(coefs, latents, outputs)
    return result + mean(_weighed(means, latents, outputs)) if means else result


def mean(value: Tensor) -> Tensor:
    """Over positions (`position_axes`), which stay as axes of size 1: float32."""
    return value.float().mean(position_axes(value.ndim), keepdim=True)


def _following(coefs: Coefs, slopes: Sequence[float], place: Tensor) -> Coefs:
    return [coef + slope * place for coef, slope in zip(coefs, slopes, strict=True)]


def _weighed(coefs: Coefs, latents: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    latent_coef, *output_coefs = coefs
    missing = max(len(output_coefs) - len(outputs), 0)
    if missing:
        output_coefs = [sum(output_coefs[: missing + 1]), *output_coefs[missing + 1 :]]
    result = latent_coef * latents.float()
    recent = outputs[len(outputs) - len(output_coefs) :]
    for coef, output in zip(output_coefs, recent, strict=True):
        if isinstance(coef, Tensor) or coef:
            result = result + coef * output.float()
    return result


def log_change(before: Tensor, output: Tensor) -> Tensor:
    """ln(‖v − v_before‖ / ‖v‖) of each sample, float32 (n,); squares below 1e-30 count as that."""
    before, output = before.float(), output.float()
    moved, size = (part.flatten(1).square().sum(dim=1).clamp_min(TINY).log() for part in (output - before, output))
    return 0.5 * (moved - size)


def place_among_samples(slopes: Slopes, change: Tensor) -> Tensor:
    """(n,): how many spreads from the calibrated samples' centre, at most `FARTHEST`."""
    return ((change - slopes.centre) / slopes.spread).clamp(-FARTHEST, FARTHEST)
