"""Pass `capture`: pipeline + prompts → full runs, and the conditioning that a pipeline makes of prompts.

The pipeline itself runs, and what it does is recorded (`record`): step by step into something that takes it
(`record_full_runs`), or into tensors, for a few steps of a few samples (`capture`).

Shapes: T steps, n samples, latents (n, …) as the scheduler sees them. Latents and outputs are float32, on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from otcache.schemas.errors import ModelError

from .call import ABOVE_ONE, CallOptions
from .interface import Interface
from .listed_arguments import as_tensors
from .record import Progress, Tape, record_first_call, record_first_step, record_run
from .trajectory import Trajectory


class StepSink(Protocol):
    """What takes full runs while they are made (`calibration.runs.RunWriter`)."""

    def write_step(
        self, rows: Sequence[int], step_index: int, timestep: float, before: Tensor, output: Tensor, after: Tensor
    ) -> None:
        """Latents before and after a step, and the guided output between them, of some of the samples: (m, …) each."""


def record_full_runs(
    pipeline: Any,
    interface: Interface,
    options: CallOptions,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance_scales: Sequence[float],
    sink: StepSink,
    *,
    rows: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """One full run of the pipeline for each prompt, into `sink`. Samples of equal guidance run as one batch.

    Args:
        prompts, seeds, guidance_scales: one of each for every sample, (n,).
        rows: where the samples stand in the sink, 0 … n−1 by default.

    Returns the conditioning by name, (branches, n, …). Raises ModelError for values that are not finite.
    """
    rows = range(len(prompts)) if rows is None else rows
    parts: list[tuple[list[int], Tape]] = []
    groups = _groups(interface, guidance_scales)
    for position, (scale, own) in enumerate(groups):
        places = [rows[i] for i in own]

        def report(done: int, total: int, position: int = position) -> None:
            if progress:
                progress(position * total + done, len(groups) * total)

        def write(
            index: int, timestep: float, before: Tensor, output: Tensor, after: Tensor, places: list[int] = places
        ) -> None:
            if not (torch.isfinite(output).all() and torch.isfinite(after).all()):
                raise ModelError(
                    f"{type(pipeline).__name__}: step {index} of a full run of {options.num_inference_steps} gave "
                    "values that are not finite: check that the pipeline itself draws pictures with these options "
                    "(in float16 large models overflow: try --precision bfloat16)"
                )
            sink.write_step(places, index, timestep, before, output, after)

        tape = record_run(
            pipeline,
            options,
            scale,
            [prompts[i] for i in own],
            [seeds[i] for i in own],
            progress=report,
            on_step=write,
        )
        parts.append((own, tape))
    order = torch.tensor([row for own, _ in parts for row in own]).argsort()
    return {
        name: torch.cat([_branches(interface, tape.calls[0], name) for _, tape in parts], dim=1)[:, order]
        for name in interface.conditioning
    }


def _groups(interface: Interface, guidance_scales: Sequence[float]) -> list[tuple[float, list[int]]]:
    """The scale with which a pipeline is called, and the samples that run at it as one batch."""
    return [
        (
            ABOVE_ONE if interface.guided and scale == 1 else scale,
            [i for i, value in enumerate(guidance_scales) if value == scale],
        )
        for scale in sorted(set(guidance_scales))
    ]


def encode_prompts(
    pipeline: Any,
    interface: Interface,
    options: CallOptions,
    prompts: Sequence[str],
    guidance_scales: Sequence[float],
) -> None:
    """Have the pipeline encode what it will encode when these samples run in full; its model is not evaluated.

    prompts, guidance_scales: one of each for every sample, (n,), in the order and number of `record_full_runs`.
    """
    for scale, own in _groups(interface, guidance_scales):
        record_first_call(pipeline, options, [prompts[i] for i in own], scale)


class _Kept:
    """A sink that keeps everything."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.latents: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.timesteps: list[float] = []

    def write_step(
        self, rows: Sequence[int], step_index: int, timestep: float, before: Tensor, output: Tensor, after: Tensor
    ) -> None:
        if step_index == len(self.outputs):
            self.outputs.append(output.new_empty(self.count, *output.shape[1:]))
            self.latents += [torch.empty_like(self.outputs[-1]) for _ in range(step_index + 2 - len(self.latents))]
            self.timesteps.append(timestep)
        self.latents[step_index][rows] = before
        self.outputs[step_index][rows] = output
        self.latents[step_index + 1][rows] = after


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
    """`record_full_runs` into tensors: for a few samples and steps, as all of them are in memory."""
    kept = _Kept(len(prompts))
    conditioning = record_full_runs(
        pipeline, interface, options, prompts, seeds, guidance_scales, kept, progress=progress
    )
    return Trajectory(
        latents=torch.stack(kept.latents),
        outputs=torch.stack(kept.outputs),
        conditioning=conditioning,
        guidance=torch.tensor([float(value) for value in guidance_scales]),
        timesteps=tuple(kept.timesteps),
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
