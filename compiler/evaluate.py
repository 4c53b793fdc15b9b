"""Pass `evaluate`: programs + held-out prompts → Quality, for ours and for peers at the same number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from otcache.schemas.manifest import Quality, Statistic
from otcache.schemas.program import Program

from . import metrics
from .capture import Denoiser, Trajectory
from .cut import Stages
from .rollout import roll_out


def _statistic(values: np.ndarray, *, higher_is_better: bool) -> Statistic:
    return Statistic(**asdict(metrics.Quality.from_values(values, higher_is_better=higher_is_better)))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts and seeds with their full runs."""

    denoiser: Denoiser
    trajectory: Trajectory
    decode: Callable[[Tensor], np.ndarray]
    references: np.ndarray
    """Pictures of the full runs, float32 (n, height, width, 3) in [0, 1]."""
    stages: Stages | None = None

    def pictures(self, program: Program) -> tuple[np.ndarray, Tensor]:
        """Pictures and final latents of a program."""
        latents = roll_out(program, self.denoiser, self.trajectory.latents[0], self.stages)
        return self.decode(latents), latents

    def quality(self, program: Program) -> Quality:
        """Fidelity of a program to the full runs: mean, standard deviation and worst case over the prompts."""
        pictures, latents = self.pictures(program)
        errors = metrics.relative_latent_error(latents.numpy(), self.trajectory.latents[-1].numpy())
        return Quality(
            psnr_db=_statistic(metrics.psnr(pictures, self.references), higher_is_better=True),
            ssim=_statistic(metrics.ssim(pictures, self.references), higher_is_better=True),
            relative_latent_error=_statistic(errors, higher_is_better=False),
        )
