"""What programs come to on held-out samples: values of each sample → what manifest and report say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from otcache.schemas.manifest import Quality, Statistic
from otcache.schemas.program import Program
from otcache.schemas.structure import MAX_FIGURE

from . import metrics
from .samples import Rows, Samples
from .scoring import Measure, kept_latents, kept_pictures, scores_of


def quality_from_scores(scores: Rows) -> Quality:
    """Mean, standard deviation and worst case of `psnr_db`, `ssim` and `latent_error`, (n,) each."""
    return Quality(
        psnr_db=_statistic(scores["psnr_db"], higher_is_better=True),
        ssim=_statistic(scores["ssim"], higher_is_better=True),
        relative_latent_error=_statistic(np.minimum(scores["latent_error"], MAX_FIGURE), higher_is_better=False),
    )


def _statistic(values: np.ndarray, *, higher_is_better: bool) -> Statistic:
    return Statistic(**asdict(metrics.Quality.from_values(values, higher_is_better=higher_is_better)))


def quality_of(samples: Samples, program: Program) -> Quality:
    """Fidelity of a program to the full runs: mean, standard deviation and worst case over the samples.

    For peers: other solvers may keep latents at scales of their own, so only the final ones are compared.
    """
    return quality_from_scores(samples.map(scores_of(program)))


def outcome_arrays(
    samples: Samples, program: Program, num_inference_steps: int, *, shown: int, worst: int
) -> dict[str, np.ndarray]:
    """Roll a program out once, and compare what it comes to with the full runs, at the end and on the way.

    Args:
        samples: n of them.
        program: with k computed steps.
        num_inference_steps: T, of the full sampler.
        shown: samples, the first ones, whose pictures are drawn.
        worst: samples, those of the lowest PSNR, whose pictures are drawn as well.

    Returns `psnr_db`, `ssim` and, where it is measured, `lpips` (n,), `errors` (k + 1, n) before each computed step and
    at the end, `positions` (k + 1,) of these on the full timeline, `latents` float32 (…) of the first sample,
    `pictures` and `worst_pictures` uint8, and `worst`, which samples those are.
    """
    scores = samples.map(Measure(program))
    lowest = np.argsort(scores["psnr_db"], kind="stable")[:worst]
    more = {"lpips": scores["lpips"]} if "lpips" in scores else {}
    return {
        **more,
        "latents": samples.map(kept_latents(program), slice(0, 1))["latents"][0],
        "pictures": samples.map(kept_pictures(program), slice(0, shown))["pictures"],
        "worst": lowest,
        "worst_pictures": pictures_at(samples, program, lowest.tolist()),
        "psnr_db": scores["psnr_db"],
        "ssim": scores["ssim"],
        "positions": np.array([*program.schedule, num_inference_steps]),
        "errors": scores["errors"].T,
    }


def pictures_at(samples: Samples, program: Program, rows: Sequence[int]) -> np.ndarray:
    """Pictures uint8 (len(rows), height, width, 3) of a program that was measured, of some samples."""
    parts = [samples.map(kept_pictures(program), slice(row, row + 1))["pictures"] for row in rows]
    return np.concatenate(parts)
