"""Pass `capture`: pipeline + prompts → Trajectory, and the conditioning that a pipeline makes of prompts.

The pipeline itself runs, and what it does is recorded (`record`).

Shapes: T steps, n samples, latents (n, …) as the scheduler sees them. Latents and outputs are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

from .call import CallOptions, short_call
from .interface import Interface
from .listed_arguments import as_tensors
from .record import Progress, Tape, recorded_run
from .trajectory import Trajectory


def capture(
    pipeline: Any,
    interface: Interface,
    options: CallOptions,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scales: Sequence[float],
    *,
    progress: Progress | None = None,
) -> Trajectory:
    """One full run of the pipeline per prompt. Samples of equal guidance run as one batch."""
    parts: list[tuple[list[int], Tape]] = []
    groups = sorted(set(guidance_scales))
    for position, scale in enumerate(groups):
        rows = [i for i, value in enumerate(guidance_scales) if value == scale]

        def report(done: int, total: int, position: int = position) -> None:
            if progress:
                progress(position * total + done, len(groups) * total)

        tape = recorded_run(
            pipeline, options, scale, [prompts[i] for i in rows], [seeds[i] for i in rows], progress=report
        )
        parts.append((rows, tape))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    latents = torch.cat([torch.stack([*tape.samples, *tape.final]) for _, tape in parts], dim=1)[:, order]
    outputs = torch.cat([torch.stack(tape.guided) for _, tape in parts], dim=1)[:, order]
    conditioning = {
        name: torch.cat([_branches(interface, tape, name) for _, tape in parts], dim=1)[:, order]
        for name in interface.conditioning
    }
    if not (torch.isfinite(latents).all() and torch.isfinite(outputs).all()):
        raise ModelError(
            f"{type(pipeline).__name__}: a full run of {options.num_inference_steps} steps gave values that are not finite: "
            "check that the pipeline itself draws pictures with these options"
        )
    scales = torch.tensor([float(value) for value in guidance_scales])
    return Trajectory(
        latents=latents,
        outputs=outputs,
        conditioning=conditioning,
        guidance=scales,
        timesteps=tuple(parts[0][1].timesteps),
    )


def conditioning_of(
    pipeline: Any, interface: Interface, options: CallOptions, guidance_scale: float, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """What the pipeline makes of prompts: each tensor (branches, n, …), branches in the order negative, positive."""
    short = short_call(pipeline, options)
    tape = recorded_run(pipeline, short, guidance_scale, prompts, range(len(prompts)))
    return {name: _branches(interface, tape, name) for name in interface.conditioning}


def _branches(interface: Interface, tape: Tape, name: str) -> Tensor:
    """One argument as (branches, n, …), in the order negative, positive."""
    calls = [as_tensors(call, interface.listed) for call in tape.calls[0]]
    values = [interface.text.padded(call, name) if interface.text else call[name] for call in calls]
    parts = list(values[0].chunk(2)) if interface.stacked else values
    if interface.guided and interface.positive_first:
        parts.reverse()
    return torch.stack(parts)
