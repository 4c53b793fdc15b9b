"""A recorded full run of n samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A full run: latents X (T+1, n, …), guided outputs V (T, n, …), conditioning and guidance of its n samples."""

    latents: Tensor
    outputs: Tensor
    conditioning: dict[str, Tensor]
    """Each (branches, n, …), branches in the order negative, positive."""
    guidance: Tensor
    """Scale of each sample, float32 (n,)."""
    timesteps: tuple[float, ...]

    @property
    def count(self) -> int:
        return self.latents.shape[1]

    def rows(self, rows: slice) -> Trajectory:
        """The same for some of the samples."""
        return Trajectory(
            latents=self.latents[:, rows],
            outputs=self.outputs[:, rows],
            timesteps=self.timesteps,
            conditioning={name: value[:, rows] for name, value in self.conditioning.items()},
            guidance=self.guidance[rows],
        )
