"""Pass `evaluate`: programs + held-out prompts → Quality, for ours and for peers at the same number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from otcache.schemas.manifest import Quality, Statistic
from otcache.schemas.program import Program

from ..graph.stages import Stages
from ..pipelines.denoiser import Denoiser
from ..pipelines.trajectory import Trajectory
from . import metrics
from .rollout import roll_out


def quality_of(psnr_db: np.ndarray, ssim: np.ndarray, latent_errors: np.ndarray) -> Quality:
    """Mean, standard deviation and worst case of (n,) values each."""
    return Quality(
        psnr_db=_statistic(psnr_db, higher_is_better=True),
        ssim=_statistic(ssim, higher_is_better=True),
        relative_latent_error=_statistic(latent_errors, higher_is_better=False),
    )


def _statistic(values: np.ndarray, *, higher_is_better: bool) -> Statistic:
    return Statistic(**asdict(metrics.Quality.from_values(values, higher_is_better=higher_is_better)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a program came to on n prompts; arrays are float64 (n,) unless said otherwise."""

    latents: np.ndarray
    """Final ones, float32 (n, …)."""
    pictures: np.ndarray
    """float32 (n, height, width, 3) in [0, 1]."""
    psnr_db: np.ndarray
    ssim: np.ndarray
    positions: tuple[int, ...]
    """k computed steps of the full timeline, then T, the end."""
    errors: np.ndarray
    """(k + 1, n): relative error of the latents before each of those steps, and of the final ones."""

    @property
    def quality(self) -> Quality:
        return quality_of(self.psnr_db, self.ssim, self.errors[-1])

    def arrays(self, shown: int, worst: int) -> dict[str, np.ndarray]:
        """What is kept of it: numbers of all prompts, latents of the first, pictures (uint8) of `shown` and of the
        worst.
        """
        lowest = np.argsort(self.psnr_db, kind="stable")[:worst]
        pictures = eight_bits(self.pictures[np.r_[: min(shown, len(self.pictures)), lowest]])
        return {
            "latents": self.latents[0].astype(np.float32),
            "pictures": pictures[: -len(lowest)],
            "worst": lowest,
            "worst_pictures": pictures[-len(lowest) :],
            "psnr_db": self.psnr_db,
            "ssim": self.ssim,
            "positions": np.array(self.positions),
            "errors": self.errors,
        }


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """float (n, height, width, 3) in [0, 1] → uint8; of videos (n, frames, …) the first, middle and last frame side by
    side.
    """
    if pictures.ndim == 5:
        frames = pictures.shape[1]
        pictures = np.concatenate([pictures[:, i] for i in (0, frames // 2, frames - 1)], axis=2)
    return np.round(255 * pictures).astype(np.uint8)


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

    def outcome(self, program: Program) -> Outcome:
        """Roll a program out once, and compare what it comes to with the full runs, at the end and on the way."""
        positions: list[int] = []
        errors: list[np.ndarray] = []

        def observe(position: int, latents: Tensor) -> None:
            positions.append(position)
            full = self.trajectory.latents[position]
            errors.append(metrics.relative_latent_error(latents.numpy(), full.numpy()))

        latents = roll_out(program, self.denoiser, self.trajectory.latents[0], self.stages, observe=observe)
        observe(len(self.trajectory.latents) - 1, latents)
        pictures = self.decode(latents)
        return Outcome(
            latents=latents.float().numpy(),
            pictures=pictures,
            psnr_db=metrics.psnr(pictures, self.references),
            ssim=metrics.ssim(pictures, self.references),
            positions=tuple(positions),
            errors=np.stack(errors),
        )

    def quality(self, program: Program) -> Quality:
        """Fidelity of a program to the full runs: mean, standard deviation and worst case over the prompts.

        For peers: other solvers may keep latents at scales of their own, so only the final ones are compared.
        """
        pictures, latents = self.pictures(program)
        errors = metrics.relative_latent_error(latents.numpy(), self.trajectory.latents[-1].numpy())
        return quality_of(metrics.psnr(pictures, self.references), metrics.ssim(pictures, self.references), errors)
