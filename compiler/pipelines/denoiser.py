"""The guided model output at any latents and time, as the pipeline would compute it.

Shapes: n samples, latents (n, …) as the scheduler sees them, float32; conditioning (branches, n, …).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import PerSample, arguments
from .guidance import with_norm_of
from .interface import Interface
from .trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The guided model output at any latents and time, for some samples, on the device where their conditioning is."""

    transformer: Any
    interface: Interface
    """Its constants have to be on that device (`place_constants`)."""
    conditioning: dict[str, Tensor]
    guidance: Tensor
    """Scale of each sample, float32 (n,)."""
    evaluated: Callable[[int], None] = lambda count: None
    """Told of the samples of every evaluation that was made, whole or in stages."""

    def inputs(self, latents: Tensor, timestep: float, input_scale: float) -> dict[str, Tensor]:
        """Tensor arguments with the branches along the batch axis: (branches · n, …)."""
        interface, dtype = self.interface, self.interface.dtype
        rows = interface.branches * latents.shape[0]
        scaled = (latents * input_scale).to(dtype)
        return {
            interface.latents_input: scaled.repeat(interface.branches, *[1] * (latents.ndim - 1)),
            interface.timestep_input: torch.full(
                (rows,), timestep * interface.timestep_scale, dtype=dtype, device=latents.device
            ),
            **{name: value.flatten(0, 1) for name, value in self.conditioning.items()},
        }

    def guide(self, output: Tensor) -> Tensor:
        """(branches · n, …) → (n, …), float32."""
        self.evaluated(output.shape[0] // self.interface.branches)
        output = output.float()
        if not self.interface.guided:
            return output
        negative, positive = output.chunk(2)
        scale = self.guidance.view(-1, *[1] * (output.ndim - 1))
        combined = negative + scale * (positive - negative)
        return with_norm_of(positive, combined) if self.interface.keep_norm else combined

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: float, input_scale: float = 1.0) -> Tensor:
        """The guided output (n, …) float32: one evaluation of the model for each sample, all branches together."""
        inputs = self.inputs(latents, timestep, input_scale)
        output = self.transformer(**arguments(inputs, self.interface.constants))
        return self.guide(self.interface.output(output))


def denoiser_of(transformer: Any, interface: Interface, trajectory: Trajectory) -> Denoiser:
    """The denoiser for a trajectory's samples."""
    return Denoiser(
        transformer=transformer, interface=interface, conditioning=trajectory.conditioning, guidance=trajectory.guidance
    )


def place_constants(interface: Interface, device: torch.device | str) -> Interface:
    """The interface with the tensors among its constants and tables on a device."""
    return replace(
        interface,
        constants={name: _move(value, device) for name, value in interface.constants.items()},
        tables={name: replace(table, value=_move(table.value, device)) for name, table in interface.tables.items()},
    )


def _move(value: Any, device: torch.device | str) -> Any:
    """A constant argument, as `arguments` takes it, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PerSample):
        return PerSample(value.row.to(device))
    if isinstance(value, Mapping):
        return {key: _move(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_move(each, device) for each in value)
    return value
