"""A recorded full run of a few samples, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
        """n."""
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

    def to(self, device: torch.device) -> Trajectory:
        """The same with conditioning and guidance on a device; latents and outputs stay where they are."""
        return Trajectory(
            latents=self.latents,
            outputs=self.outputs,
            timesteps=self.timesteps,
            conditioning={name: value.to(device) for name, value in self.conditioning.items()},
            guidance=self.guidance.to(device),
        )
