"""Pass `capture`: pipeline + prompts → Trajectory, and the conditioning that a pipeline makes of prompts.

The pipeline itself runs, and what it does is recorded (`record`).

Shapes: T steps, n samples, latents (n, …) as the scheduler sees them. Latents and outputs are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

from .call import ABOVE_ONE, CallOptions
from .interface import Interface
from .listed_arguments import as_tensors
from .record import Progress, Tape, record_first_call, record_first_step, record_run
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

        at = ABOVE_ONE if interface.guided and scale == 1 else scale
        tape = record_run(pipeline, options, at, [prompts[i] for i in rows], [seeds[i] for i in rows], progress=report)
        parts.append((rows, tape))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    latents = torch.cat([torch.stack([*tape.samples, *tape.final]) for _, tape in parts], dim=1)[:, order]
    outputs = torch.cat([torch.stack(tape.guided) for _, tape in parts], dim=1)[:, order]
    conditioning = {
        name: torch.cat([_branches(interface, tape.calls[0], name) for _, tape in parts], dim=1)[:, order]
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
    calls = record_first_step(pipeline, options, guidance_scale, prompts)
    return {name: _branches(interface, calls, name) for name in interface.conditioning}


def positive_conditioning(
    pipeline: Any, interface: Interface, options: CallOptions, prompts: Sequence[str]
) -> dict[str, Tensor]:
    """What the pipeline makes of prompts for its positive branch, each tensor (n, …). Its transformer does not run."""
    call = as_tensors(record_first_call(pipeline, options, prompts), interface.listed)
    values = {
        name: interface.text.padded(call, name) if interface.text else call[name] for name in interface.conditioning
    }
    if interface.positive_first:
        return {name: value[: len(prompts)] for name, value in values.items()}
    return {name: value[-len(prompts) :] for name, value in values.items()}


def with_known_negative(
    pipeline: Any, interface: Interface, options: CallOptions, guidance_scale: float, prompts: Sequence[str]
) -> CallOptions:
    """The options with the empty text as negative prompt, where a pipeline that is given none takes just that.

    Where it takes something else, such as zeros, the options stay without one.
    """
    if options.negative_prompt is not None:
        return options
    empty = dataclasses.replace(options, negative_prompt="")
    if not interface.guided or "negative_prompt" not in options.accepted:
        return empty
    ways = [conditioning_of(pipeline, interface, each, guidance_scale, prompts[:1]) for each in (options, empty)]
    return empty if all(torch.equal(ways[0][name], ways[1][name]) for name in ways[0]) else options


def _branches(interface: Interface, calls: Sequence[dict[str, Any]], name: str) -> Tensor:
    """One argument of a step's calls as (branches, n, …), in the order negative, positive."""
    calls = [as_tensors(call, interface.listed) for call in calls]
    values = [interface.text.padded(call, name) if interface.text else call[name] for call in calls]
    parts = list(values[0].chunk(2)) if interface.stacked else values
    if interface.guided and interface.positive_first:
        parts.reverse()
    return torch.stack(parts)
