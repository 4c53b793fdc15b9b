"""The guided model output at any latents and time, as the pipeline would compute it.

Shapes: n samples, latents (n, …) as the scheduler sees them, float32; conditioning (branches, n, …).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .arguments import arguments
from .guidance import with_norm_of
from .interface import Interface
from .trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The guided model output at any latents and time, for the samples of one trajectory. Counts its evaluations."""

    transformer: Any
    interface: Interface
    conditioning: dict[str, Tensor]
    guidance: Tensor
    evaluations: list[int] = field(default_factory=lambda: [0])
    """Sample evaluations so far (a guided one counts once), in a list so that it can grow."""

    def inputs(self, latents: Tensor, timestep: float, input_scale: float) -> dict[str, Tensor]:
        """Tensor arguments with the branches along the batch axis: (branches · n, …)."""
        interface, count = self.interface, latents.shape[0]
        dtype = next(self.transformer.parameters()).dtype
        rows = interface.branches * count
        scaled = (latents * input_scale).to(dtype)
        return {
            interface.latents_input: scaled.repeat(interface.branches, *[1] * (latents.ndim - 1)),
            interface.timestep_input: torch.full((rows,), timestep * interface.timestep_scale, dtype=dtype),
            **{name: value.flatten(0, 1) for name, value in self.conditioning.items()},
        }

    def guide(self, output: Tensor) -> Tensor:
        """(branches · n, …) → (n, …), float32."""
        output = output.float()
        if not self.interface.guided:
            return output
        negative, positive = output.chunk(2)
        scale = self.guidance.view(-1, *[1] * (output.ndim - 1))
        combined = negative + scale * (positive - negative)
        return with_norm_of(positive, combined) if self.interface.keep_norm else combined

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: float, input_scale: float = 1.0) -> Tensor:
        inputs = self.inputs(latents, timestep, input_scale)
        output = self.transformer(**arguments(inputs, self.interface.constants))
        self.evaluations[0] += latents.shape[0]
        return self.guide(self.interface.output(output))


def denoiser_of(transformer: Any, interface: Interface, trajectory: Trajectory) -> Denoiser:
    """The denoiser for a trajectory's samples."""
    return Denoiser(
        transformer=transformer, interface=interface, conditioning=trajectory.conditioning, guidance=trajectory.guidance
    )
