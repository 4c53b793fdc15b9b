"""A quality that a request asks for → the budget that was measured to reach it, by the manifest's own figures.

The figures are of the prompts that the compile held out: a single prompt may come to more or less.
"""

from __future__ import annotations

import math

from otcache.schemas.errors import RequestError, UsageError
from otcache.schemas.manifest import FULL, Manifest
from otcache.schemas.messages import one_line
from otcache.schemas.targets import Condition, Metric, Over, Target, smallest_program, target_of_quality


def budget_of_target(manifest: Manifest, target: Target) -> str:
    """The smallest budget that was measured to reach a target, or `full`, which is exact, where none was.

    Raises RequestError where nothing was measured of it, or nothing reaches it and the artifact has no `full`.
    """
    if "lpips" in target.metrics:
        raise RequestError(f"quality {target.text}: an artifact's figures are PSNR and SSIM: ask for those")
    found = smallest_program(manifest.programs, target)
    if found is not None:
        return found.budget
    if FULL in manifest.budgets:
        return FULL
    raise RequestError(
        f"quality {target.text}: no budget of {', '.join(manifest.budgets)} was measured to reach it: ask for less"
    )


def budget_of_quality(manifest: Manifest, text: str) -> str:
    """The same of a tier's name (`schemas.targets.TIERS`) or of a text such as `psnr>=35`. Raises RequestError."""
    try:
        target = target_of_quality(text, "quality")
    except UsageError as error:
        raise RequestError(str(error)) from None
    return budget_of_target(manifest, target)


def target_from_figures(*, psnr_db: float | None, ssim: float | None, worst: bool) -> Target:
    """The target that PSNR in dB and SSIM are at least these, of the mean or of the worst prompt. Raises
    RequestError.
    """
    over: Over = "worst" if worst else "mean"
    given: dict[Metric, float | None] = {"psnr": psnr_db, "ssim": ssim}
    for metric, value in given.items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise RequestError(f"{metric} is {one_line(repr(value), 40)}: expected a number")
    return Target(tuple(Condition(metric, over, float(value)) for metric, value in given.items() if value is not None))
